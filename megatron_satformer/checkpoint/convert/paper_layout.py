"""Between the layout of another repository and our Hugging Face folder, bit for bit.

The other layout, declared in an architecture's record, is a folder of config.json and
model.safetensors or pytorch_model.bin, with names of its own for keys and options. Tensors keep
their dtype; options that ours has no place for are carried along in config.json, so that the way
back gives the same file.
"""

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
from megatron_satformer.model.architectures.layouts import PAPER, PaperLayout

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MULTIPLE = 256  # of an MLP's width that they derive
CARD = """# {architecture}

Converted from the layout of {repository}, bit for bit.
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
    layout, sources = _find_layout(config, str(load)), _sources_of_ours(config)
    if config.tie_word_embeddings:
        folder = folder.without_tied(*(rename(name, config) for name in (HEAD, EMBEDDING)))
    theirs = {name: source.shape for name, source in _sources_of_theirs(config).items()}
    folder.check(theirs, f"this {folder.config['model_type']}")
    config.dtype = folder.find_dtype(rename(EMBEDDING, config))
    config.architectures = [model_class(config.architecture).__name__]
    if build_paper_config(config) != folder.config:
        config.paper_config = folder.config
    with written_atomically(save) as partial:
        check_target(save, CONFIG, overwrite)
        size = _copy_weights(folder, sources, partial, parse_shard_size("5GB"))
        write_config(config, config, partial)
        folder.copy_tokenizer(partial)
        card = CARD.format(architecture=config.architecture, repository=layout.repository.name)
        (partial / "README.md").write_text(card, encoding="utf-8")
    kind = str(folder.config["model_type"])
    parameters = sum(map(math.prod, theirs.values()))
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
    sources = _sources_of_theirs(config)
    config.dtype = folder.find_dtype(EMBEDDING)
    content = build_paper_config(config)
    original = getattr(config, "paper_config", getattr(config, "reference_config", None))
    if original is not None and _same_model(build_config(original, str(load)), config):
        content = original
    with written_atomically(save) as partial:
        check_target(save, CONFIG, overwrite)
        # one file: their loader knows no index
        size = _copy_weights(folder, sources, partial, 1 << 60)
        (partial / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        folder.copy_tokenizer(partial)
    kind = str(content["model_type"])
    parameters = sum(math.prod(source.shape) for source in sources.values())
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
    layout, architecture = _recognise(content, where)
    repository = layout.repository
    theirs = {**repository.defaults, **content}
    if not theirs.get("use_value_residual", True):
        layout, architecture = find_architecture(PLAIN).paper[0], PLAIN
    _check_computed(theirs, layout, where)
    fields = {ours: theirs[name] for ours, name in {**repository.fields, **layout.options}.items()}
    fields |= layout.read(theirs)
    if fields["intermediate_size"] is None:
        fields["intermediate_size"] = _derive_width(fields["hidden_size"], theirs["hidden_ratio"])
    last_k = fields.get("value_residual_last_k")
    if last_k is not None and last_k >= fields["num_hidden_layers"]:
        fields["value_residual_last_k"] = None
    eps = repository.qk_norm_eps
    eps = eps if fields["qk_norm"] and fields["rms_norm_eps"] != eps else None
    rope = {"rope_type": "default", "rope_theta": float(theirs[repository.rope_theta])}
    config = config_class(architecture)(**fields, qk_norm_eps=eps, rope_parameters=rope)
    reason = layout.refuse(config)
    if reason is not None:
        raise ValueError(f"{where} cannot be converted: {reason}.")
    return config


def build_paper_config(config: Any) -> dict[str, Any]:
    """Writes our options as theirs.

    Args:
        config: Of a model that `convert_to_paper` does not refuse.
    """
    assert config.rope_parameters is not None
    layout = _find_layout(config)
    repository = layout.repository
    content: dict[str, Any] = {"architectures": [layout.class_name]}
    content["model_type"] = layout.model_type
    fields = {**repository.fields, **layout.options}
    content |= {name: getattr(config, ours) for ours, name in fields.items()}
    content |= {name: values[0] for name, values in repository.allowed.items()}
    content[repository.rope_theta] = config.rope_parameters["rope_theta"]
    content["torch_dtype"] = str(config.dtype).removeprefix("torch.")
    return content | dict(layout.fixed(config))


def _recognise(content: Mapping[str, Any], where: str) -> tuple[PaperLayout, str]:
    """The layout of a config.json, and the architecture that has it."""
    kind, found = content.get("model_type"), None
    layouts = [(layout, a.name) for a in all_architectures() for layout in a.paper]
    for layout, architecture in layouts:
        sign = layout.repository.sign
        if layout.model_type == kind and (sign is None or content.get(sign) is not None):
            found = layout, architecture
    if found is None:
        kinds = dict.fromkeys(layout.model_type for layout, _ in layouts)
        raise ValueError(
            f"model_type ({kind}) of {where} must be {' or '.join(kinds)}, as in the paper's "
            "repository."
        )
    return found


def _find_layout(config: Any, where: str = "") -> PaperLayout:
    """How another repository stores a model.

    Raises:
        ValueError: None does, or what of it is computed otherwise there.
    """
    layouts = find_architecture(config.architecture).paper
    if not layouts:
        raise ValueError(
            f"architecture ({config.architecture}) must be one of the paper's repository to be "
            "converted to its layout."
        )
    refused = {layout.repository.name: layout.refuse(config) for layout in layouts}
    for layout in layouts:
        if refused[layout.repository.name] is None:
            return layout
    reasons = "; and for the layout of ".join(
        f"{name}: {reason}" if n else str(reason)
        for n, (name, reason) in enumerate(refused.items())
    )
    raise ValueError(f"{where} cannot be converted: {reasons}.")


def _check_computed(theirs: Mapping[str, Any], layout: PaperLayout, where: str) -> None:
    repository = layout.repository
    for name, values in {**repository.allowed, **layout.allowed(theirs)}.items():
        if theirs[name] not in values:
            raise ValueError(
                f"{name} ({theirs[name]}) of {where} must be {' or '.join(map(str, values))}: ours "
                "computes nothing else."
            )
    if theirs[repository.rope_theta] is None:
        raise ValueError(f"{repository.rope_theta} (None) of {where} must be a number.")
    size, heads = (repository.fields[name] for name in ("hidden_size", "num_attention_heads"))
    if theirs[size] % theirs[heads]:
        raise ValueError(
            f"{size} ({theirs[size]}) of {where} must be a multiple of {heads} ({theirs[heads]})."
        )


def _check_representable(config: Any, where: str, accept: bool) -> list[str]:
    repository = _find_layout(config, where).repository
    heads = config.num_attention_heads
    if config.head_dim * heads != config.hidden_size:
        raise ValueError(
            f"head_dim ({config.head_dim}) of {where} must be hidden_size / num_attention_heads "
            f"({config.hidden_size} / {heads}): {repository.name} knows no other."
        )
    if config.attention_dropout:
        raise ValueError(
            f"attention_dropout ({config.attention_dropout}) of {where} must be 0: "
            f"{repository.name} has none."
        )
    eps = config.rms_norm_eps if config.qk_norm_eps is None else config.qk_norm_eps
    there = repository.qk_norm_eps or config.rms_norm_eps
    if not config.qk_norm or eps == there:
        return []
    if not accept:
        raise ValueError(
            f"QK-norm's epsilon ({eps}) of {where} must be {there}, as {repository.name} has it. "
            "To convert all the same, which moves the logits, pass --accept-qk-norm-eps."
        )
    return [
        f"NOTE: QK-norm's epsilon is {there} there and was {eps}, which moves the logits; "
        "compare the folder with what from-paper makes of it to see how far."
    ]


def _same_model(one: Any, other: Any) -> bool:
    own = find_architecture(one.architecture).model_options
    fields = (*PAPER.fields, *own, "qk_norm_eps", "head_dim", "rope_parameters")
    return type(one) is type(other) and all(
        getattr(one, field) == getattr(other, field) for field in fields
    )


def _derive_width(hidden_size: int, ratio: float | None) -> int:
    """Two thirds of the ratio, rounded up to a multiple; gate, up and down are three matrices."""
    width = int(hidden_size * (4 if ratio is None else ratio) * 2 / 3)
    return math.ceil(width / MULTIPLE) * MULTIPLE


def rename(name: str, config: Any) -> str:
    """Their name of a tensor of ours; "*" in it stands for the number of a piece."""
    layout = _find_layout(config)
    for names in (layout.names, layout.repository.names):
        for ours, theirs in names.items():
            name = re.sub(ours, theirs, name)
    return name


class Source(NamedTuple):
    """What a tensor that is written is made of.

    Attributes:
        names: Of the tensors read, one behind the other.
        shape: It has.
        piece: Which, of the pieces of that shape that they hold.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    piece: int = 0


def _sources_of_theirs(config: Any) -> dict[str, Source]:
    shapes = _find_layout(config).shapes(config)
    found = {}
    for name, ours in model_shapes(config).items():
        theirs = next((s for pattern, s in shapes.items() if re.search(pattern, name)), ours)
        left = math.prod(ours) // abs(math.prod(theirs))
        shape = tuple(left if n == -1 else n for n in theirs)
        for piece in range(math.prod(ours) // math.prod(shape)):
            key = rename(name, config).replace("*", str(piece))
            found[key] = Source((name,), shape, piece)
    return found


def _sources_of_ours(config: Any) -> dict[str, Source]:
    names: dict[str, tuple[str, ...]] = {}
    for theirs, source in _sources_of_theirs(config).items():
        names[source.names[0]] = (*names.get(source.names[0], ()), theirs)
    return {name: Source(names[name], shape) for name, shape in model_shapes(config).items()}


def _copy_weights(
    folder: HFFolder, sources: Mapping[str, Source], partial: Path, shard_size: int
) -> int:
    """Returns the bytes copied. A tensor's axes may change, its numbers not."""
    tensors = {name: _announce(folder, source) for name, source in sources.items()}
    writer = ShardWriter(tensors, partial, shard_size)
    check_space(partial, writer.bytes)
    writer.write_all((name, _build(folder, source)) for name, source in sources.items())
    return writer.bytes


def _announce(folder: HFFolder, source: Source) -> torch.Tensor:
    """Of the shape and dtype of what will be built, on the meta device."""
    dtypes = {folder.tensors[name].dtype for name in source.names}
    if len(dtypes) > 1:
        raise ValueError(
            f"{source.names[0]} and {source.names[-1]} of {folder.path} must be of one dtype, not "
            f"of {' and '.join(sorted(map(str, dtypes)))}: they become one tensor."
        )
    return torch.empty(source.shape, dtype=dtypes.pop(), device="meta")


def _build(folder: HFFolder, source: Source) -> torch.Tensor:
    parts = [folder.read(name) for name in source.names]
    whole = parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts])
    return whole.reshape(-1, *source.shape)[source.piece]
