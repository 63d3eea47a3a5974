"""Turns a Megatron checkpoint into a folder that transformers loads.

One CPU process, no process group. Weights go from file to file tensor by tensor, so that memory
does not grow with the model; --verify alone loads it.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_satformer.checkpoint.compare.verification import (
    check_verifiable,
    verify_folder,
)
from megatron_satformer.checkpoint.convert.names import (
    EMBEDDING,
    Name,
    convert_to_hf,
    iterate_names,
)
from megatron_satformer.checkpoint.convert.options import build_hf_config, check_exportable
from megatron_satformer.checkpoint.dtypes import DTYPES, choose_dtype
from megatron_satformer.checkpoint.hugging_face.card import Facts, build_card
from megatron_satformer.checkpoint.hugging_face.code import (
    build_auto_map,
    config_class,
    model_class,
    model_shapes,
    write_code,
)
from megatron_satformer.checkpoint.hugging_face.folder import CONFIG, GENERATION_CONFIG
from megatron_satformer.checkpoint.hugging_face.origin import Origin, find_origin
from megatron_satformer.checkpoint.hugging_face.plain_classes import IDS, STOCK, build_stock_config
from megatron_satformer.checkpoint.hugging_face.shards import ShardWriter, parse_shard_size
from megatron_satformer.checkpoint.hugging_face.tokenizer import (
    build_transformers_tokenizer,
    check_same_ids,
    load_tokenizer,
    save_tokenizer,
)
from megatron_satformer.checkpoint.hugging_face.tokenizer_source import find_tokenizer
from megatron_satformer.checkpoint.megatron.reader import MegatronCheckpoint, open_checkpoint
from megatron_satformer.checkpoint.megatron.vocabulary import find_vocabulary
from megatron_satformer.checkpoint.tensor_names import check_tensor_names
from megatron_satformer.data.tokenizers.options import TokenizerOptions
from megatron_satformer.files.output_folder import check_space, check_target, written_atomically
from megatron_satformer.model.architectures import PLAIN


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: Where.
        step: Training iterations of the checkpoint.
        parameters: Number of them, tied ones once.
        dtype: "bf16", "fp16" or "fp32".
        model_class: Class of transformers, or of the folder's own code, that the weights are for.
        verified: How far the logits are from Megatron's; None if it was not asked for.
        bytes: Of the whole folder.
        seconds: Spent.
    """

    folder: Path
    step: int
    parameters: int
    dtype: str
    model_class: str
    verified: str | None
    bytes: int
    seconds: float

    def __str__(self) -> str:
        line = (
            f"{self.folder}: {self.model_class}, step {self.step}, {self.parameters:,} parameters "
            f"in {self.dtype}, {self.bytes / 1e6:.1f} MB, {self.seconds:.1f} s"
        )
        return line if self.verified is None else f"{line}\nverified: {self.verified}"


def export_to_hf(
    load: Path,
    save: Path,
    step: int | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
    max_shard_size: str = "5GB",
    verify: bool = False,
    overwrite: bool = False,
) -> Export:
    """Writes the folder, whole or not at all.

    Args:
        load: Folder of checkpoints, or of one step.
        save: Folder to make.
        step: Iterations; None for the last one saved.
        dtype: One of DTYPES; None for the one trained in.
        tokenizer: A file or folder that `find_tokenizer` knows; None for the checkpoint's own,
            "none" to export without.
        max_shard_size: Of one safetensors file, such as "5GB".
        verify: Whether to run both models and write the difference into the card.
        overwrite: Whether an earlier export at `save` may be replaced.

    Raises:
        ValueError: If anything given, or in the checkpoint, does not allow an exact export.
    """
    start = time.perf_counter()
    shard_size = parse_shard_size(max_shard_size)
    check_target(save, CONFIG, overwrite)
    checkpoint = open_checkpoint(load, step)
    checkpoint.check_files()
    plan = build_plan(checkpoint, dtype, tokenizer)
    parameters = sum(tensor.numel() for tensor in plan.shapes.values())
    if verify:
        check_verifiable(checkpoint, parameters)
    with written_atomically(save) as folder:
        # once more under the lock: another run may have finished since
        check_target(save, CONFIG, overwrite)
        writer = ShardWriter(plan.shapes, folder, shard_size)
        check_space(folder, writer.bytes)
        tokens = _write_config_and_tokenizer(plan, folder)
        writer.write_all(_iterate_tensors(checkpoint, plan.config, DTYPES[plan.dtype]))
        verified = verify_folder(checkpoint, folder) if verify else None
        name = model_class_name(plan.config, plan.stock)
        facts = Facts(
            checkpoint.step, parameters, plan.dtype, name, plan.stock is None, tokens, verified
        )
        card = build_card(plan.config, checkpoint.args, facts)
        (folder / "README.md").write_text(card, encoding="utf-8")
        size = sum(file.stat().st_size for file in folder.iterdir())
    seconds = time.perf_counter() - start
    return Export(save, checkpoint.step, parameters, plan.dtype, name, verified, size, seconds)


@dataclass(frozen=True)
class Plan:
    """All that is known before the first byte is written.

    Attributes:
        config: In our own class.
        stock: Configuration of the stock class that is exact, or None.
        shapes: What is to be written, on the meta device.
        dtype: One of DTYPES.
        options: Flags of the tokenizer, or None to export without.
        tokens: The tokenizer that they make.
        origin: What the folder said that the model was imported from, if it was.
    """

    config: Any
    stock: Any | None
    shapes: dict[str, Tensor]
    dtype: str
    options: TokenizerOptions | None
    tokens: Any
    origin: Origin | None

    @property
    def keeps_ids(self) -> bool:
        """Whether the ids of bos, eos and pad are those of the folder imported."""
        return self.origin is not None and self.origin.has_tokenizer(self.tokens)


def build_plan(checkpoint: MegatronCheckpoint, dtype: str | None, tokenizer: str | None) -> Plan:
    """Finds out what an export will be, and whether it can be.

    Args:
        checkpoint: Opened.
        dtype: One of DTYPES; None for the one trained in.
        tokenizer: As in `export_to_hf`.

    Raises:
        ValueError: If anything given, or in the checkpoint, does not allow an exact export.
    """
    args = checkpoint.args
    dtype = choose_dtype(args, dtype)
    check_exportable(args)
    options = find_tokenizer(args, tokenizer)
    tokens, origin = None, find_origin(args)
    if options is not None:
        tokens = build_transformers_tokenizer(options, getattr(args, "chat_template", None))
    stored = checkpoint.tensors.get(EMBEDDING.megatron)
    if stored is None:
        raise ValueError(f"{checkpoint.folder} does not fit its own args: it has no embedding.")
    vocabulary = find_vocabulary(args, stored.size[0], None if tokens is None else len(tokens))
    config = build_hf_config(args, vocabulary.size)
    for name, value in _find_ids(tokens, origin, vocabulary.end).items():
        setattr(config, name, value)
    stock = build_stock_config(config, None if origin is None else origin.model_type)
    _check_names(checkpoint, config)
    shapes = _build_shapes(config, DTYPES[dtype])
    return Plan(config, stock, shapes, dtype, options, tokens, origin)


def read_state_dict(
    checkpoint: MegatronCheckpoint, config: Any, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Reads the model under its Hugging Face names, layer by layer.

    Args:
        checkpoint: Opened.
        config: Of the exported model.
        dtype: Of all but what stays float32, such as ResFormer's lambdas: bf16 is too coarse.

    Raises:
        ValueError: If a weight is too large for float16.
    """
    return dict(_iterate_tensors(checkpoint, config, dtype))


def _iterate_tensors(
    checkpoint: MegatronCheckpoint, config: Any, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name in iterate_names(config):
        yield from _read_converted(checkpoint, name, config, dtype).items()


def _check_names(checkpoint: MegatronCheckpoint, config: Any) -> None:
    """Names every key that is missing, unknown or of another shape."""
    stored = {key: tensor.size for key, tensor in checkpoint.tensors.items()}
    expected: dict[str, Sequence[int]] = {}
    shapes = model_shapes(config)
    for name in iterate_names(config):
        shape = sum(shapes[part][0] for part in name.hf), *shapes[name.hf[0]][1:]
        if name.packing == "vocabulary" and name.megatron in stored:
            shape = max(shape[0], stored[name.megatron][0]), *shape[1:]  # padding
        if name.megatron not in stored and name.stacked in stored:
            expected[name.stacked] = config.num_hidden_layers, *shape
        else:
            expected[name.megatron] = shape
    check_tensor_names(stored, expected, f"{checkpoint.folder} does not fit its own args")


def _find_ids(tokens: Any, origin: Origin | None, end: int | None) -> dict[str, Any]:
    """The ids of bos, eos and pad: the imported folder's, else the tokenizer's."""
    if origin is not None and origin.has_tokenizer(tokens):
        return {name: origin.config[name] for name in IDS}
    if tokens is None:
        return dict.fromkeys(IDS) | {"eos_token_id": end}
    ids = {name: getattr(tokens, name) for name in IDS}
    if origin is not None:
        told = {name: value for name, value in origin.config.items() if name in IDS}
        print(
            f"note: the tokenizer is not that of the folder imported, so the special ids are its "
            f"own ({ids}) and not that folder's ({told}).",
            file=sys.stderr,
        )
    return ids


def model_class_name(config: Any, stock: Any | None) -> str:
    """Returns the class that loads the export.

    Args:
        config: Of the model, in our own class.
        stock: Of `build_stock_config`.
    """
    if stock is None:
        return str(model_class(config.architecture).__name__)
    return STOCK[stock.model_type].name


def _build_shapes(config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns what is to be written, on the meta device: a stock class has the same tensors."""
    wide = {name for tensor in iterate_names(config) if tensor.fp32 for name in tensor.hf}
    return {
        name: torch.empty(shape, dtype=torch.float32 if name in wide else dtype, device="meta")
        for name, shape in model_shapes(config).items()
    }


def _read_converted(
    checkpoint: MegatronCheckpoint, name: Name, config: Any, dtype: torch.dtype
) -> dict[str, Tensor]:
    wanted = torch.float32 if name.fp32 else dtype
    if name.megatron in checkpoint.tensors:
        tensor = checkpoint.read(name.megatron, dtype=wanted)
    else:
        tensor = checkpoint.read(name.stacked, index=name.layer, dtype=wanted)
    pieces = convert_to_hf(name, tensor, config)
    if wanted == torch.float16:
        for key, piece in pieces.items():
            if not piece.isfinite().all():
                raise ValueError(
                    f"dtype (fp16) must hold every weight, and {key} has one beyond 65504 or not "
                    "finite. Pass --dtype bf16 or fp32."
                )
    return pieces


def _write_config_and_tokenizer(plan: Plan, folder: Path) -> Any:
    """Returns the tokenizer as loaded again, or None."""
    written: Any = plan.config if plan.stock is None else plan.stock
    written.dtype = DTYPES[plan.dtype]
    written.architectures = [model_class_name(plan.config, plan.stock)]
    if plan.stock is not None:
        # readers from before transformers 5 look for it here, and else take a default in silence
        written.rope_theta = written.rope_parameters["rope_theta"]
    write_config(written, plan.config, folder, plan.origin, plan.keeps_ids)
    if plan.options is None:
        return None
    save_tokenizer(plan.tokens, folder)
    tokens = load_tokenizer(folder, written)
    check_same_ids(tokens, plan.options)
    return tokens


def write_config(
    config: Any, ids: Any, folder: Path, origin: Origin | None = None, with_ids: bool = True
) -> None:
    """Writes config.json, generation_config.json, and the code that our own class needs.

    Args:
        config: Of the model.
        ids: Has the ids of bos, eos and pad that texts are made with.
        folder: Where.
        origin: What the folder said that the model was imported from, if it was.
        with_ids: Whether the ids that it said are those of the model still.
    """
    import transformers

    if isinstance(config, config_class(PLAIN)):  # which all of ours subclass
        config.auto_map = build_auto_map(config.architecture)
        write_code(config.architecture, folder)
    config.to_json_file(folder / CONFIG)
    special = {name: getattr(ids, name) for name in IDS}
    transformers.GenerationConfig(**special).save_pretrained(folder)
    if origin is None:
        return
    _rewrite(folder / CONFIG, lambda content: origin.complete(content, with_ids))
    if origin.generation is None:
        (folder / GENERATION_CONFIG).unlink()  # transformers takes it from config.json then
    else:
        said = origin.generation | ({} if with_ids else special)
        version = {"transformers_version": transformers.__version__}
        _rewrite(folder / GENERATION_CONFIG, lambda _: said | version)


def _rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    content = change(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
