"""Turns a Hugging Face folder into a Megatron checkpoint that a training run starts from.

Takes what to-hf writes, and dense Llama, Mistral, Qwen2 and Qwen3 models. One CPU process, no
process group; one tensor at a time in memory.
"""

import math
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_satformer.checkpoint.convert.names import (
    EMBEDDING,
    Name,
    convert_to_megatron,
    iterate_names,
)
from megatron_satformer.checkpoint.dtypes import DTYPES, NAMES, check_dtype
from megatron_satformer.checkpoint.hugging_face.accepted import (
    check_tensors,
    model_shapes,
    parse_config,
    read_model,
)
from megatron_satformer.checkpoint.hugging_face.folder import HFFolder, open_hf_folder
from megatron_satformer.checkpoint.hugging_face.loading import has_tokenizer
from megatron_satformer.checkpoint.hugging_face.origin import Origin, read_origin
from megatron_satformer.checkpoint.hugging_face.tokenizer import build_transformers_tokenizer
from megatron_satformer.checkpoint.hugging_face.tokenizer_source import detect_tokenizer
from megatron_satformer.checkpoint.megatron.args import (
    build_args,
    pad_vocab_size,
    tokenizer_flags,
    training_flags,
)
from megatron_satformer.checkpoint.megatron.reader import TRACKER
from megatron_satformer.checkpoint.megatron.release import RELEASE, Piece, write_release
from megatron_satformer.files.output_folder import check_space, check_target, written_atomically
from megatron_satformer.model.architectures import find_architecture

EXTRA_STATES = (
    *("self_attention.linear_qkv", "self_attention.linear_proj"),
    *("mlp.linear_fc1", "mlp.linear_fc2"),
    # asked for by Transformer Engine's modules alone
    *("self_attention.core_attention", "self_attention.q_layernorm", "self_attention.k_layernorm"),
)
WIDTH = 92


@dataclass(frozen=True)
class Import:
    """What was written.

    Attributes:
        folder: Where.
        architecture: Of the model that was written.
        source: model_type of the folder read.
        parameters: Number of them, without padding; tied ones once.
        dtype: "bf16", "fp16" or "fp32".
        bytes: Of the tensors written.
        seconds: Spent.
        flags: Of pretrain_satformer.py, for this model.
        tokenizer: Its flags; empty if the folder has none.
        notes: What is worth knowing before training.
    """

    folder: Path
    architecture: str
    source: str
    parameters: int
    dtype: str
    bytes: int
    seconds: float
    flags: tuple[str, ...]
    tokenizer: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        made = (
            f"{self.folder}: {self.architecture} (model_type {self.source}), "
            f"{self.parameters:,} parameters in {self.dtype}, {self.bytes / 1e6:.1f} MB, "
            f"{self.seconds:.1f} s"
        )
        start = f"--pretrained-checkpoint {shlex.quote(str(self.folder))}"
        flags = _wrap([start, *self.flags, *self.tokenizer])
        missing = [] if self.tokenizer else ["The folder has no tokenizer: add your own's flags."]
        return "\n".join(
            [
                made,
                *self.notes,
                "pretrain_satformer.py starts from it with these flags and your own:",
                flags,
            ]
            + missing
        )


def import_from_hf(
    load: Path,
    save: Path,
    overwrite: bool = False,
    architecture: str | None = None,
    options: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    make_vocab_size_divisible_by: int = 128,
    tensor_model_parallel_size: int = 1,
    accept_qk_norm_eps: bool = False,
) -> Import:
    """Writes the checkpoint, whole or not at all.

    Args:
        load: Folder with config.json and weights.
        save: Folder to make, for --pretrained-checkpoint or --load.
        overwrite: Whether an earlier import at `save` may be replaced.
        architecture: What a plain Transformer becomes, with what that adds at its start; None
            keeps what it is.
        options: Own options of that architecture, such as {"value_gate": "identity"}.
        dtype: One of DTYPES; None for the folder's.
        make_vocab_size_divisible_by: Of the embedding's rows, on each tensor-parallel rank.
        tensor_model_parallel_size: For that padding alone: the checkpoint fits any layout.
        accept_qk_norm_eps: Whether QK-norm may get the other norms' epsilon, all that Megatron has.

    Raises:
        ValueError: If anything given, or in the folder, does not allow an exact import.
    """
    start = time.perf_counter()
    _check_save(save, overwrite)
    folder = open_hf_folder(load)
    model = read_model(folder, architecture, options or {}, accept_qk_norm_eps)
    config = model.config
    folder = check_tensors(folder, config, model.adds)
    kind = _find_dtype(folder, dtype)
    origin = read_origin(folder, parse_config(folder.config, load), _load_tokenizer(load))
    padded = pad_vocab_size(
        config.vocab_size, make_vocab_size_divisible_by, tensor_model_parallel_size
    )
    pieces = list(_plan(folder, config, DTYPES[kind], padded))
    size = sum(piece.bytes for piece in pieces)
    args = build_args(config, DTYPES[kind], padded, load if has_tokenizer(load) else None)
    origin.put_into(args)
    print(origin, *_compare_sizes(origin), sep="\n", flush=True)
    with written_atomically(save) as partial_folder:
        _check_save(save, overwrite)  # now that no other process can make it
        check_space(partial_folder, size)
        write_release(partial_folder, pieces, args, list(_extra_states(config)))
    return Import(
        folder=save,
        architecture=config.architecture,
        source=str(folder.config["model_type"]),
        parameters=sum(map(math.prod, model_shapes(config).values())),
        dtype=kind,
        bytes=size,
        seconds=time.perf_counter() - start,
        flags=tuple(training_flags(args)),
        tokenizer=tuple(tokenizer_flags(args)),
        notes=model.notes,
    )


def _check_save(save: Path, overwrite: bool) -> None:
    """--overwrite replaces an import, and not the run that has gone on from it in its folder."""
    check_target(save, TRACKER, overwrite)
    others = sorted(f.name for f in save.iterdir()) if save.is_dir() else []
    others = [name for name in others if name not in (RELEASE, TRACKER)]
    if others:
        raise ValueError(
            f"save ({save}) holds more than an earlier import ({', '.join(others[:4])}), so it is "
            "not overwritten. Choose another."
        )


def _load_tokenizer(load: Path) -> Any:
    """As to-hf will have it; None where there is none, or none that loads: training says why."""
    if not has_tokenizer(load):
        return None
    try:
        return build_transformers_tokenizer(detect_tokenizer(load))
    except Exception:  # a tokenizer's files may raise anything
        return None


def _compare_sizes(origin: Origin) -> list[str]:
    entries = (origin.tokenizer or (0,))[0] or 0
    if entries <= origin.vocab_size:
        return []
    return [
        f"NOTE: the tokenizer has {entries} entries and the model {origin.vocab_size}, which it "
        "keeps: ids from there on are none of its own."
    ]


def _find_dtype(folder: HFFolder, given: str | None) -> str:
    if given is not None:
        return check_dtype(given)
    found = folder.find_dtype(EMBEDDING.hf[0])
    if found not in NAMES:
        raise ValueError(
            f"dtype ({found}) of {folder.path} must be given: pass --dtype bf16 or fp32."
        )
    return NAMES[found]


def _plan(folder: HFFolder, config: Any, dtype: torch.dtype, padded: int) -> Iterator[Piece]:
    alike = find_architecture(config.architecture).config.layers_alike
    for name in iterate_names(config):
        kind = torch.float32 if name.fp32 else dtype
        stacked = alike and name.layer is not None
        yield Piece(
            key=name.stacked if stacked else name.megatron,
            shape=_find_shape(name, folder, config, padded),
            dtype=kind,
            build=partial(_build, name, folder, config, kind, padded),
            index=name.layer if stacked else None,
            count=config.num_hidden_layers,
        )


def _find_shape(name: Name, folder: HFFolder, config: Any, padded: int) -> tuple[int, ...]:
    if name.hf[0] not in folder.tensors:
        return _start_shape(name, padded)
    shapes = [folder.tensors[part].shape for part in name.hf]
    rows = padded if name.packing == "vocabulary" else sum(shape[0] for shape in shapes)
    return (rows, *shapes[0][1:])


def _start_shape(name: Name, padded: int) -> tuple[int, ...]:
    """Of what the folder does not have."""
    assert name.own is not None, name
    shape = name.own.shape
    return (padded, *shape[1:]) if name.packing == "vocabulary" else shape


def _build(name: Name, folder: HFFolder, config: Any, dtype: torch.dtype, padded: int) -> Tensor:
    if name.hf[0] not in folder.tensors:
        assert name.own is not None, name
        if name.own.like is not None:
            return folder.read(name.own.like, dtype)
        return name.own.start(_start_shape(name, padded)).to(dtype)
    parts = {part: folder.read(part, dtype) for part in name.hf}
    return convert_to_megatron(name, parts, config, padded)


def _extra_states(config: Any) -> Iterator[str]:
    """Keys with their place, of every layer; stacked layers have one key and many places."""
    layers, norm = config.num_hidden_layers, ".layer_norm_weight"
    for _, tensor in find_architecture(config.architecture).all_tensors(config):
        if tensor.megatron.endswith(norm):  # of a linear layer of the architecture's own
            yield f"{tensor.megatron.removesuffix(norm)}._extra_state/shard_0_1"
    for n in range(layers):
        for module in EXTRA_STATES:
            if find_architecture(config.architecture).config.layers_alike:
                yield f"decoder.layers.{module}._extra_state/shard_{n}_{layers}"
            else:
                yield f"decoder.layers.{n}.{module}._extra_state/shard_0_1"
    yield "decoder.final_layernorm._extra_state/shard_0_1"


def _wrap(words: list[str]) -> str:
    """A command over several lines, as a shell reads it."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > WIDTH:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(f"    {line}" for line in lines)
