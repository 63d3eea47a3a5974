"""Says what a checkpoint or a Hugging Face folder holds, from lists and headers alone.

No weights are read: it takes a moment for a model of any size. What is missing or cut short is
named beside the rest.
"""

import json
import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_satformer.checkpoint.convert.options import own_options
from megatron_satformer.checkpoint.convert.paper_layout import build_config, rename
from megatron_satformer.checkpoint.dtypes import CODES, NAMES
from megatron_satformer.checkpoint.hugging_face.accepted import parse_config
from megatron_satformer.checkpoint.hugging_face.loading import has_tokenizer, is_hugging_face
from megatron_satformer.checkpoint.hugging_face.weights import Stored, list_weights, read_json
from megatron_satformer.checkpoint.megatron.damage import find_damage
from megatron_satformer.checkpoint.megatron.reader import (
    MODEL_KEY,
    MegatronCheckpoint,
    list_steps,
    open_checkpoint,
)
from megatron_satformer.model.architectures import TABLE, find_architecture
from megatron_satformer.model.architectures.record import OwnTensor

# Group -> the args that say most, in this order; those that are absent or not given are left out.
ARGS = {
    "model": "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups "
    "kv_channels num_experts "
    "max_position_embeddings rotary_base padded_vocab_size untie_embeddings_and_output_weights",
    "layout": "tensor_model_parallel_size pipeline_model_parallel_size "
    "virtual_pipeline_model_parallel_size context_parallel_size expert_model_parallel_size "
    "data_parallel_size sequence_parallel use_distributed_optimizer",
    "training": "bf16 fp16 optimizer lr min_lr weight_decay global_batch_size seq_length "
    "train_iters consumed_train_samples",
    "data": "data_path split tokenizer_type tokenizer_model",
}
CONFIG = (
    "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads "
    "head_dim max_position_embeddings rope_parameters vocab_size tie_word_embeddings dtype"
)
EMBEDDINGS = ("embedding.", "output_layer.", "embed_tokens", "lm_head")
LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
WIDTH = 100


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the model: its shape and dtype ("fp32", "bf16", ...)."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Inspection:
    """What a folder holds.

    Attributes:
        folder: What was looked at: of a Megatron checkpoint, one step's folder.
        kind: "Megatron" or "Hugging Face".
        step: Training iterations done; None for Hugging Face.
        steps: All the steps that lie beside it.
        tokens: Read in training so far; None where it is not known.
        options: Group -> option -> value, those that say most.
        all_options: Every option.
        tensors: Key -> shape and dtype, of the model alone.
        bytes: On disk, by purpose.
        problems: Files that are missing or cut short.
        own: Keys of `tensors` that the architecture adds to a plain Transformer.
    """

    folder: str
    kind: str
    step: int | None
    steps: list[int]
    tokens: int | None
    options: Mapping[str, Mapping[str, Any]]
    all_options: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    bytes: Mapping[str, int]
    problems: list[str]
    own: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def parameters(self) -> dict[str, int]:
        """Numbers stored: all, in embedding and output layer, in what the architecture adds."""
        counts = {key: prod(tensor.shape) for key, tensor in self.tensors.items()}
        embedding = [n for key, n in counts.items() if any(part in key for part in EMBEDDINGS)]
        own = [n for key, n in counts.items() if key in self.own]
        return {"total": sum(counts.values()), "embedding": sum(embedding), "own": sum(own)}

    def to_json(self) -> str:
        """All of it, every option and tensor included."""
        return json.dumps(asdict(self) | {"parameters": self.parameters}, indent=2, default=str)

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.kind}"]
        if self.step is not None:
            tokens = "" if self.tokens is None else f", {self.tokens:,} tokens"
            others = [str(step) for step in self.steps if step != self.step]
            beside = f" (also there: {_shortened(others)})" if others else ""
            lines[0] += f", step {self.step:,}{tokens}{beside}"
        for group, options in self.options.items():
            shown = [f"{key} {_plain(value)}" for key, value in options.items()]
            lines += _wrapped(group, shown)
        numbers = self.parameters
        lines += _wrapped(
            "parameters",
            [f"{numbers['total']:,} in all" + " with padding" * (self.kind == "Megatron")]
            + [f"{numbers['embedding']:,} in embedding"]
            + [f"{numbers['own']:,} that a plain Transformer has not"],
        )
        lines += _wrapped("on disk", [f"{k} {_size(v)}" for k, v in self.bytes.items()])
        lines += ["", f"{len(self.tensors)} tensors of the model:"]
        lines += [f"  {line}" for line in _folded(self.tensors)]
        lines += [f"PROBLEM: {problem}" for problem in self.problems]
        return "\n".join(lines)


def inspect_checkpoint(checkpoint: Path, step: int | None = None) -> Inspection:
    """Looks at a folder.

    Args:
        checkpoint: Megatron checkpoint, one step of it, or Hugging Face folder.
        step: Iterations; None for the last one saved.

    Raises:
        ValueError: If it is neither, or the lists themselves cannot be read.
    """
    if is_hugging_face(checkpoint, "CKPT", step):
        return _inspect_hugging_face(checkpoint)
    return _inspect_megatron(checkpoint, step)


def _inspect_megatron(load: Path, step: int | None) -> Inspection:
    checkpoint = open_checkpoint(load, step)
    args, folder = checkpoint.args, checkpoint.folder
    samples, length = (getattr(args, n, None) for n in ("consumed_train_samples", "seq_length"))
    return Inspection(
        folder=str(folder),
        kind="Megatron",
        step=checkpoint.step,
        steps=list_steps(folder.parent),
        tokens=samples * length if samples is not None and length else None,
        options=_chosen_args(args),
        all_options=dict(sorted(vars(args).items())),
        tensors={
            key: StoredTensor(tuple(stored.size), _name_dtype(stored.properties.dtype))
            for key, stored in checkpoint.tensors.items()
        },
        bytes=_megatron_bytes(checkpoint),
        problems=find_damage(folder, checkpoint.metadata),  # the optimizer's files too
        own=_own_keys(SimpleNamespace(**_shape(args))),
    )


def _shape(args: Namespace) -> dict[str, Any]:
    """What an architecture's own tensors depend on."""
    grouped = getattr(args, "group_query_attention", False)
    groups = args.num_query_groups if grouped else args.num_attention_heads
    names = ("num_layers", "hidden_size", "kv_channels", "ffn_hidden_size")
    shape = {name: getattr(args, name, None) for name in names}
    return own_options(args) | shape | {"num_query_groups": groups}


def _own_keys(options: Any) -> frozenset[str]:
    return frozenset(find_architecture(options.architecture).by_key(options))


def _own_tensors(options: Any) -> list[OwnTensor]:
    return [t for _, t in find_architecture(options.architecture).all_tensors(options)]


def _chosen_args(args: Namespace) -> dict[str, dict[str, Any]]:
    given = vars(args)
    groups = {
        group: {name: given[name] for name in names.split() if given.get(name) not in (None, False)}
        for group, names in ARGS.items()
    }
    own = {name: value for name, value in own_options(args).items() if value not in (None, False)}
    model = groups["model"] = own | groups["model"]
    if not given.get("group_query_attention"):
        model.pop("num_query_groups", None)
    return groups


def _megatron_bytes(checkpoint: MegatronCheckpoint) -> dict[str, int]:
    sizes = {"model": 0, "optimizer": 0}
    for where, info in checkpoint.metadata.storage_data.items():
        if "optimizer" in where.fqn:
            sizes["optimizer"] += info.length
        elif MODEL_KEY.match(where.fqn) and where.fqn in checkpoint.tensors:
            sizes["model"] += info.length
    total = sum(file.stat().st_size for file in checkpoint.folder.rglob("*") if file.is_file())
    return sizes | {"other": max(0, total - sum(sizes.values())), "total": total}


def _inspect_hugging_face(folder: Path) -> Inspection:
    config, found = read_json(folder / "config.json"), list_weights(folder, _refuse_torch_file)
    tensors = {
        key: StoredTensor(stored.shape, _name_dtype(stored.code))
        for key, stored in found.tensors.items()
    }
    own, named = _hugging_face_own(config, folder)
    shown = ("architectures", "model_type", "architecture", *named, *CONFIG.split())
    model = {name: config[name] for name in shown if config.get(name) is not None}
    if "dtype" not in model and "torch_dtype" in config:
        model["dtype"] = config["torch_dtype"]
    weights = sum(file.stat().st_size for file in found.files)
    total = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return Inspection(
        folder=str(folder),
        kind="Hugging Face",
        step=None,
        steps=[],
        tokens=None,
        options={
            "model": model,
            "files": {
                "weights": len(found.files),
                "tokenizer": "yes" if has_tokenizer(folder) else "none",
                "code": "its own" if config.get("auto_map") else "transformers'",
            },
        },
        all_options=config,
        tensors=dict(sorted(tensors.items(), key=lambda item: _natural(item[0]))),
        bytes={"model": weights, "other": total - weights, "total": total},
        problems=found.problems,
        own=own,
    )


def _hugging_face_own(content: Mapping[str, Any], folder: Path) -> tuple[frozenset[str], list[str]]:
    """Names of the architecture's own tensors, and of its options; none where it is not ours."""
    try:
        config, rename_own = parse_config(content, folder), lambda name: name
    except ValueError:
        try:
            config = build_config(content, str(folder))
        except ValueError:
            return frozenset(), []
        rename_own = partial(rename, config=config)
    if getattr(config, "architecture", None) not in TABLE:
        return frozenset(), []  # transformers' own class
    names = [rename_own(name) for tensor in _own_tensors(config) for name in tensor.hf]
    return frozenset(names), [*find_architecture(config.architecture).model_options]


def _refuse_torch_file(file: Path) -> dict[str, Stored]:
    raise ValueError(f"{file} is no safetensors file: its keys are not read.")


def _folded(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """One line for all keys that differ in numbers alone and are alike."""
    groups: dict[tuple[str, StoredTensor], list[int]] = {}
    for key, tensor in tensors.items():
        number = LAYER.search(key)
        groups.setdefault((LAYER.sub("*", key), tensor), []).append(int(number[0]) if number else 0)
    rows = []
    for (pattern, tensor), numbers in groups.items():
        name = pattern.replace("*", _ranges(numbers), 1)
        count = f" x {len(numbers)}" if len(numbers) > 1 else ""
        rows.append((name, f"{list(tensor.shape)} {tensor.dtype}{count}"))
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:<{width}}  {what}" for name, what in rows]


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _wrapped(group: str, parts: list[str]) -> list[str]:
    lines, line = [], f"{group:<12}"
    for number, part in enumerate(parts):
        part = part + ("," if number < len(parts) - 1 else "")
        if len(line) + 1 + len(part) > WIDTH and line.strip() != group:
            lines.append(line)
            line = " " * 12
        line += f" {part}"
    return [*lines, line]


def _plain(value: Any) -> str:
    if value is True:
        return "yes"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and value >= 10**6 else str(value)


def _shortened(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 6 else [*names[:3], "...", *names[-2:]])


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", key)]


def _name_dtype(stored: Any) -> str:
    """Of torch's dtype, or of safetensors' code."""
    return NAMES.get(CODES.get(stored, stored), str(stored).removeprefix("torch."))


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
