"""Which plain Transformers are a class of transformers' own, to the last weight.

RMSNorm, rotary embedding, SwiGLU and attention are the same in all of these; what differs is the
QK-norm, which Qwen3 alone has, and the biases of the projections.
"""

from dataclasses import dataclass
from typing import Any

from megatron_satformer.model.architectures import find_architecture

# fields that mean the same in all of them, and in ours
SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_dropout",
)
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Stock:
    """A class of transformers: its name, and what its attention has in every model."""

    name: str
    qk_norm: bool = False
    qkv_bias: bool = False  # without one on the output projection


STOCK = {
    "llama": Stock("LlamaForCausalLM"),
    "mistral": Stock("MistralForCausalLM"),
    "qwen2": Stock("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Stock("Qwen3ForCausalLM", qk_norm=True),
}


def build_stock_config(config: Any, former: str | None = None) -> Any | None:
    """Builds the configuration of the stock class that computes exactly what `config` does.

    Args:
        config: Of the model, in our own class.
        former: model_type of the folder that the model was imported from: the class that is chosen
            where it is one of those that are exact.

    Returns:
        The configuration, of a Qwen3 or a Llama where `former` says nothing, or None where no class
        is exact: for another architecture; for biases (theirs come with one on the output
        projection, ours do not); for a QK-norm with an epsilon of its own; for a hidden size that
        Llama refuses because the heads do not divide it.
    """
    from transformers import CONFIG_MAPPING

    kind = former if former in STOCK else "qwen3" if config.qk_norm else "llama"
    has = bool(config.qk_norm), bool(config.attention_bias)
    if has != (STOCK[kind].qk_norm, STOCK[kind].qkv_bias):
        return None if former is None else build_stock_config(config)
    if not find_architecture(config.architecture).stock or config.mlp_bias:
        return None
    if config.qk_norm and config.qk_norm_eps not in (None, config.rms_norm_eps):
        return None
    names = (*SHAPE_FIELDS, "hidden_act", "bos_token_id", "eos_token_id")
    fields = {name: getattr(config, name) for name in names}
    assert config.rope_parameters is not None
    fields["rope_parameters"] = dict(config.rope_parameters)
    # Their embedding gives a pad token no gradient: fine-tuning would never move an eos that pads.
    pad = config.pad_token_id
    fields["pad_token_id"] = None if pad == config.eos_token_id else pad
    if kind == "llama" and config.hidden_size % config.num_attention_heads:
        return None
    none = dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window"), False)
    known = vars(CONFIG_MAPPING[kind]())
    fields |= {name: value for name, value in none.items() if name in known}
    return CONFIG_MAPPING[kind](**fields, **({"sliding_window": None} if kind == "mistral" else {}))
