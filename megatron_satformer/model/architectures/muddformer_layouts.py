"""MUDDFormer as its authors release it, and as the repository of arXiv 2605.03953 has it.

Must not know: layers.
"""

from collections.abc import Mapping
from typing import Any

from megatron_satformer.model.architectures.layouts import PaperLayout, Repository
from megatron_satformer.model.architectures.mudd_sums import NUM_WAYS


def _read_baseline(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Of a width that is not given it takes the nearest multiple; without a ratio all are alike."""
    ours: dict[str, Any] = {"mudd_form": "baseline"}
    ratio, width = theirs["hidden_ratio"], theirs["intermediate_size"]
    if width is None and ratio is not None:
        width = (int(theirs["hidden_size"] * ratio * 2 / 3) + 127) // 256 * 256
        ours["intermediate_size"] = max(256, width)
    if width is None or theirs["num_hidden_layers"] == 1:
        ours["mudd_ffn_realloc"] = False
    return ours


def _refuse_baseline(options: Any) -> str | None:
    if options.mudd_form == "baseline":
        return None
    return (
        f"mudd_form ({options.mudd_form}) must be baseline: in the paper's repository queries, "
        "keys and values have norms of their own in the first layer too"
    )


BASELINE = PaperLayout(
    "muddformer",
    "MUDDFormerForCausalLM",
    names={
        r"\.input_layernorm\.": ".attn_norm_q.",
        r"\.input_layernorm_(k|v)\.": r".attn_norm_\1.",
        r"\.aggregate\.(w1|w2)": r".da.\1.weight",
        r"\.aggregate\.static": ".da.static_weight",
        r"\.aggregate\.(pre|post)_gains": r".da.\1_da_norms.*.weight",
    },
    shapes=lambda options: {
        rf"\.{options.num_hidden_layers - 1}\.aggregate\.static": (1, -1),
        r"\.static": (NUM_WAYS, -1),
        r"_gains": (options.hidden_size,),
    },
    options={
        "mudd_prepost_norm": "use_pre_post_da_norm",
        "mudd_ffn_realloc": "param_realloc",
    },
    read=_read_baseline,
    fixed=lambda options: {"num_ways": NUM_WAYS},
    allowed=lambda theirs: {"num_ways": (NUM_WAYS,)},
    refuse=_refuse_baseline,
)

AUTHORS = Repository(
    name="its authors' repository (arXiv 2502.12170)",
    sign="dim",
    names={
        r"model\.embed_tokens\.": "tok_embeddings.",
        r"model\.norm\.": "norm.",
        r"lm_head\.": "output.",
        r"model\.layers\.": "layers.",
        r"layers\.0\.input_layernorm\.": "layers.0.attention_norm.",
        r"\.input_layernorm\.": ".attention_norms.0.",
        r"\.input_layernorm_k\.": ".attention_norms.1.",
        r"\.input_layernorm_v\.": ".attention_norms.2.",
        r"\.self_attn\.(q|k|v|o)_proj\.": r".attention.w\1.",
        r"\.self_attn\.": ".attention.",
        r"\.post_attention_layernorm\.": ".ffn_norm.",
        r"\.mlp\.gate_proj\.": ".feed_forward.w1.",
        r"\.mlp\.up_proj\.": ".feed_forward.w3.",
        r"\.mlp\.down_proj\.": ".feed_forward.w2.",
    },
    fields={
        "hidden_size": "dim",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_local_heads",
        "qk_norm": "use_qk_norm",
        "max_position_embeddings": "block_size",
        "intermediate_size": "intermediate_size",
        "rms_norm_eps": "norm_eps",
        "pad_token_id": "pad_token_id",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "tie_word_embeddings": "tie_word_embeddings",
        "vocab_size": "vocab_size",
    },
    rope_theta="rope_base",
    defaults={
        "dim": 2560,
        "n_layer": 32,
        "n_head": 32,
        "n_local_heads": -1,
        "use_qk_norm": False,
        "block_size": 2048,
        "intermediate_size": None,
        "hidden_ratio": 4,
        "norm_eps": 1e-6,
        "rope_base": 10000,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "vocab_size": 50432,
        "dense": True,
        "dynamic_dense": True,
        "sepln": True,
        "dense_type": "qkvr",
        "expand_last": False,
        "round64": False,
    },
    allowed={
        "dense": (True,),
        "dynamic_dense": (True,),
        "sepln": (True,),
        "dense_type": ("qkvr",),
    },
)


def _read_released(theirs: Mapping[str, Any]) -> dict[str, Any]:
    ours: dict[str, Any] = {"mudd_form": "released" if theirs["round64"] else "paper"}
    if theirs["n_local_heads"] == -1:
        ours["num_key_value_heads"] = theirs["n_head"]
    return ours | {"mudd_ffn_realloc": True}


def _refuse_released(options: Any) -> str | None:
    needed = {
        "mudd_form": ("released", "paper"),
        "mudd_prepost_norm": (False,),
        "mudd_ffn_realloc": (True,),
        "attention_bias": (False,),
        "tie_word_embeddings": (False,),
    }
    if options.num_hidden_layers < 2:
        return f"num_hidden_layers ({options.num_hidden_layers}) must be at least 2: MLPs grow"
    for name, values in needed.items():
        if getattr(options, name) not in values:
            allowed = " or ".join(map(str, values))
            return (
                f"{name} ({getattr(options, name)}) must be {allowed}: {AUTHORS.name} has no other"
            )
    return None


def _wider(options: Any) -> dict[str, bool]:
    return dict.fromkeys(("expand_last", "round64"), options.mudd_form == "released")


RELEASED = PaperLayout(
    "muddformer",
    "MUDDFormer",
    names={
        r"model\.layers\.(\d+)\.aggregate\.static": r"dense_bs.\1",
        r"model\.layers\.(\d+)\.aggregate\.(w1|w2)": r"dynamic_dense.\1.\2.weight",
    },
    shapes=BASELINE.shapes,
    read=_read_released,
    fixed=_wider,
    allowed=lambda theirs: {"expand_last": (theirs["round64"],)},
    refuse=_refuse_released,
    repository=AUTHORS,
)
