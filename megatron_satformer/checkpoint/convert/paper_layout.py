"""Between the layout of the paper's own repository and our Hugging Face folder, bit for bit.

The other layout is a folder of config.json and model.safetensors or pytorch_model.bin, with names
of its own for keys and options. Tensors keep their dtype; options that ours has no place for are
carried along in config.json, so that the way back gives the same file.
"""

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_satformer.checkpoint.convert.to_hf import write_config
from megatron_satformer.checkpoint.hugging_face.accepted import check_tensors, read_config
from megatron_satformer.checkpoint.hugging_face.code import (
    config_class,
    model_class,
    model_shapes,
)
from megatron_satformer.checkpoint.hugging_face.folder import CONFIG, HFFolder, open_hf_folder
from megatron_satformer.checkpoint.hugging_face.shards import ShardWriter, parse_shard_size
from megatron_satformer.files.output_folder import check_space, check_target, written_atomically
from megatron_satformer.model.architectures import (
    PLAIN,
    all_architectures,
    find_architecture,
)
from megatron_satformer.model.architectures.record import PaperLayout

EMBEDDING = "model.embed_tokens.weight"
# The epsilon of QK-norm there, whatever norm_eps says.
QK_NORM_EPS = 1e-5
# pattern in our name -> theirs; those of an architecture's own tensors are in its record
RENAMED = {
    r"model\.embed_tokens\.": "model.embeddings.",
    r"\.input_layernorm\.": ".attn_norm.",
    r"\.post_attention_layernorm\.": ".mlp_norm.",
    r"\.self_attn\.": ".attn.",
}
# our field -> theirs, where the value is the same
FIELDS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "attention_bias": "qkv_bias",
    "qk_norm": "qk_norm",
    "max_position_embeddings": "max_position_embeddings",
    "intermediate_size": "intermediate_size",
    "initializer_range": "initializer_range",
    "rms_norm_eps": "norm_eps",
    "use_cache": "use_cache",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "tie_word_embeddings": "tie_word_embeddings",
    "vocab_size": "vocab_size",
}
# what their classes take a missing key for
DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_heads": 32,
    "num_kv_heads": None,
    "qkv_bias": False,
    "qk_norm": False,
    "window_size": None,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "initializer_range": 0.02,
    "norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "use_value_residual": True,
    "value_residual_gate": "relu",
    "value_residual_proj_bias": False,
    "value_residual_last_k": None,
    "dwa_dilation": 1,
    "dwa_period": 1,
    "expansion_rate": 4,
    "use_dynamic_hc": True,
    "use_tanh": True,
}
MULTIPLE = 256  # of an MLP's width that they derive
CARD = """# {architecture}

Converted from the layout of the paper's own repository (arXiv 2605.03953), bit for bit.
Needs torch and transformers >= 5.4: `AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)`.
"""


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        folder: Where.
        model: "SATFormer", "ResFormer" or "transformer".
        parameters: Number of them, tied ones once.
        bytes: Of the tensors.
        seconds: Spent.
        notes: What the user should read.
    """

    folder: Path
    model: str
    parameters: int
    bytes: int
    seconds: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        made = (
            f"{self.folder}: {self.model}, {self.parameters:,} parameters, "
            f"{self.bytes / 1e6:.1f} MB, {self.seconds:.1f} s"
        )
        return "\n".join([made, *self.notes])


def convert_from_paper(load: Path, save: Path, overwrite: bool = False) -> Conversion:
    """Writes our Hugging Face folder, whole or not at all.

    Args:
        load: Folder in the paper's layout.
        save: Folder to make.
        overwrite: Whether an earlier output at `save` may be replaced.

    Raises:
        ValueError: If the folder is not whole, or holds what our classes do not compute.
    """
    start = time.perf_counter()
    check_target(save, CONFIG, overwrite)
    folder = open_hf_folder(load)
    config = build_config(folder.config, str(load))
    if config.tie_word_embeddings:
        folder = folder.without_tied("lm_head.weight", rename(EMBEDDING, config))
    shapes = model_shapes(config)
    names = {name: rename(name, config) for name in shapes}
    folder.check(_their_shapes(config), f"this {folder.config['model_type']}")
    config.dtype = folder.find_dtype(names[EMBEDDING])
    config.architectures = [model_class(config.architecture).__name__]
    if build_paper_config(config) != folder.config:
        config.paper_config = folder.config
    with written_atomically(save) as partial:
        check_target(save, CONFIG, overwrite)
        size = _copy_weights(folder, names, shapes, partial, parse_shard_size("5GB"))
        write_config(config, config, partial)
        folder.copy_tokenizer(partial)
        card = CARD.format(architecture=config.architecture)
        (partial / "README.md").write_text(card, encoding="utf-8")
    kind = str(folder.config["model_type"])
    parameters = sum(map(math.prod, shapes.values()))
    return Conversion(save, kind, parameters, size, time.perf_counter() - start)


def convert_to_paper(
    load: Path, save: Path, overwrite: bool = False, accept_qk_norm_eps: bool = False
) -> Conversion:
    """Writes the folder in the paper's layout, whole or not at all.

    Args:
        load: Hugging Face folder of ours, or of a Llama or Qwen3 that is a plain Transformer.
        save: Folder to make.
        overwrite: Whether an earlier output at `save` may be replaced.
        accept_qk_norm_eps: Whether QK-norm may get the epsilon that it has there.

    Raises:
        ValueError: If the folder is not whole, or the other code does not compute its model.
    """
    start = time.perf_counter()
    check_target(save, CONFIG, overwrite)
    folder = open_hf_folder(load)
    config = read_config(folder)
    notes = _check_representable(config, str(load), accept_qk_norm_eps)
    folder = check_tensors(folder, config)
    shapes = _their_shapes(config)
    names = {rename(name, config): name for name in model_shapes(config)}
    config.dtype = folder.find_dtype(EMBEDDING)
    content = build_paper_config(config)
    original = getattr(config, "paper_config", getattr(config, "reference_config", None))
    if original is not None and _same_model(build_config(original, str(load)), config):
        content = original
    with written_atomically(save) as partial:
        check_target(save, CONFIG, overwrite)
        # one file: their loader knows no index
        size = _copy_weights(folder, names, shapes, partial, 1 << 60)
        (partial / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        folder.copy_tokenizer(partial)
    kind = str(content["model_type"])
    parameters = sum(map(math.prod, shapes.values()))
    seconds = time.perf_counter() - start
    return Conversion(save, kind, parameters, size, seconds, tuple(notes))


def build_config(content: Mapping[str, Any], where: str) -> Any:
    """Reads their options as ours.

    Args:
        content: Of their config.json.
        where: Folder, for messages.

    Raises:
        ValueError: Names the option that our classes have no equal for.
    """
    kind = content.get("model_type")
    layouts = {a.paper.model_type: a.name for a in all_architectures() if a.paper is not None}
    if kind not in layouts:
        raise ValueError(
            f"model_type ({kind}) of {where} must be {' or '.join(layouts)}, as in the paper's "
            "repository."
        )
    theirs = DEFAULTS | dict(content)
    architecture = layouts[str(kind)] if theirs["use_value_residual"] else PLAIN
    _check_computed(theirs, where)
    fields = {ours: theirs[name] for ours, name in FIELDS.items()}
    if fields["intermediate_size"] is None:
        fields["intermediate_size"] = _derive_width(theirs["hidden_size"], theirs["hidden_ratio"])
    fields |= {ours: theirs[name] for ours, name in _paper(architecture).options.items()}
    last_k = fields.get("value_residual_last_k")
    if last_k is not None and last_k >= fields["num_hidden_layers"]:
        fields["value_residual_last_k"] = None
    eps = QK_NORM_EPS if theirs["qk_norm"] and theirs["norm_eps"] != QK_NORM_EPS else None
    rope = {"rope_type": "default", "rope_theta": float(theirs["rope_theta"])}
    config = config_class(architecture)(**fields, qk_norm_eps=eps, rope_parameters=rope)
    _check_own_options(config, where)
    return config


def build_paper_config(config: Any) -> dict[str, Any]:
    """Writes our options as theirs.

    Args:
        config: Of a model that `convert_to_paper` does not refuse.
    """
    assert config.rope_parameters is not None
    paper = _paper(config.architecture)
    content: dict[str, Any] = {"architectures": [f"{paper.class_name}ForCausalLM"]}
    content["model_type"] = paper.model_type
    content |= {name: getattr(config, ours) for ours, name in {**FIELDS, **paper.options}.items()}
    content |= {"hidden_act": "swish", "window_size": None}
    content["rope_theta"] = config.rope_parameters["rope_theta"]
    content["torch_dtype"] = str(config.dtype).removeprefix("torch.")
    return content | dict(paper.fixed)


def _paper(architecture: str) -> PaperLayout:
    """How that repository stores an architecture.

    Raises:
        ValueError: It does not.
    """
    layout = find_architecture(architecture).paper
    if layout is None:
        raise ValueError(
            f"architecture ({architecture}) must be one of the paper's repository to be converted "
            "to its layout."
        )
    return layout


def _check_computed(theirs: Mapping[str, Any], where: str) -> None:
    if theirs["window_size"] is not None:
        raise ValueError(
            f"window_size ({theirs['window_size']}) of {where} must be null: ours has none."
        )
    if theirs["hidden_act"] not in ("swish", "silu"):
        raise ValueError(
            f"hidden_act ({theirs['hidden_act']}) of {where} must be swish, as in ours."
        )
    if theirs["rope_theta"] is None:
        raise ValueError(f"rope_theta (None) of {where} must be a number.")
    if theirs["hidden_size"] % theirs["num_heads"]:
        raise ValueError(
            f"hidden_size ({theirs['hidden_size']}) of {where} must be a multiple of num_heads "
            f"({theirs['num_heads']})."
        )


def _check_own_options(config: Any, where: str) -> None:
    reason = _paper(config.architecture).refuse(config)
    if reason is not None:
        raise ValueError(f"{where} cannot be converted: {reason}.")


def _check_representable(config: Any, where: str, accept: bool) -> list[str]:
    heads = config.num_attention_heads
    if config.head_dim * heads != config.hidden_size:
        raise ValueError(
            f"head_dim ({config.head_dim}) of {where} must be hidden_size / num_attention_heads "
            f"({config.hidden_size} / {heads}): the paper's repository knows no other."
        )
    if config.attention_dropout:
        raise ValueError(
            f"attention_dropout ({config.attention_dropout}) of {where} must be 0: the paper's "
            "repository has none."
        )
    _check_own_options(config, where)
    eps = config.rms_norm_eps if config.qk_norm_eps is None else config.qk_norm_eps
    if not config.qk_norm or eps == QK_NORM_EPS:
        return []
    if not accept:
        raise ValueError(
            f"QK-norm's epsilon ({eps}) of {where} must be {QK_NORM_EPS}, which is fixed in the "
            "paper's repository. To convert all the same, which moves the logits, pass "
            "--accept-qk-norm-eps."
        )
    return [
        f"NOTE: QK-norm's epsilon is {QK_NORM_EPS} there and was {eps}, which moves the logits; "
        "compare the folder with what from-paper makes of it to see how far."
    ]


def _same_model(one: Any, other: Any) -> bool:
    own = _paper(one.architecture).options
    fields = (*FIELDS, *own, "qk_norm_eps", "head_dim", "rope_parameters")
    return type(one) is type(other) and all(
        getattr(one, field) == getattr(other, field) for field in fields
    )


def _derive_width(hidden_size: int, ratio: float | None) -> int:
    """Two thirds of the ratio, rounded up to a multiple; gate, up and down are three matrices."""
    width = int(hidden_size * (4 if ratio is None else ratio) * 2 / 3)
    return math.ceil(width / MULTIPLE) * MULTIPLE


def rename(name: str, config: Any) -> str:
    """Their name of a tensor of ours."""
    for ours, theirs in {**_paper(config.architecture).names, **RENAMED}.items():
        name = re.sub(ours, theirs, name)
    return name


def _their_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    others = _paper(config.architecture).shapes(config)
    found = {}
    for name, shape in model_shapes(config).items():
        theirs = others.get(name.rpartition(".")[2], shape)
        found[rename(name, config)] = tuple(math.prod(shape) if n == -1 else n for n in theirs)
    return found


def _copy_weights(
    folder: HFFolder,
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    partial: Path,
    shard_size: int,
) -> int:
    """Returns the bytes copied. A tensor's axes may change, its numbers not."""
    tensors = {
        name: torch.empty(shape, dtype=folder.tensors[names[name]].dtype, device="meta")
        for name, shape in shapes.items()
    }
    writer = ShardWriter(tensors, partial, shard_size)
    check_space(partial, writer.bytes)
    writer.write_all((n, folder.read(names[n]).reshape(shape)) for n, shape in shapes.items())
    return writer.bytes
