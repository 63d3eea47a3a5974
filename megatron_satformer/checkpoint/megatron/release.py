"""Writes `torch_dist` checkpoints of Megatron on one CPU process, without any process group.

Each tensor is made when its turn to be written comes, so memory is that of one file and one tensor,
not of the model. What is written is what Megatron (0.19.2) itself would have written from one rank
without an optimizer. Must not know: what the tensors mean.
"""

import json
import math
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    FileSystemWriter,
    SavePlan,
    SavePlanner,
    save,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_satformer.checkpoint.megatron.reader import TRACKER

# Megatron's name for weights that no training step belongs to: loading them starts at step 0, with
# a fresh optimizer, also without --finetune.
RELEASE = "release"
CONTENT_METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
FILE_SIZE = 1 << 28  # bytes of tensors, from which on another file is begun
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


@dataclass(frozen=True)
class Piece:
    """One tensor to write, or one layer of a tensor that holds all layers.

    Attributes:
        key: In the checkpoint.
        shape: Of what `build` returns.
        dtype: Of what `build` returns.
        build: Makes it; called once.
        index: Where on a leading axis it lies; None for a tensor of its own.
        count: Length of that axis.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    build: Callable[[], Tensor]
    index: int | None = None
    count: int = 1

    @property
    def bytes(self) -> int:
        """On disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Place in the whole tensor."""
        offsets, sizes = [0] * len(self.shape), list(self.shape)
        if self.index is not None:
            offsets, sizes = [self.index, *offsets], [1, *sizes]
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def write_release(
    folder: Path, pieces: Sequence[Piece], args: Namespace, extra_states: Sequence[str]
) -> None:
    """Writes a checkpoint of weights alone, as pretrain_satformer.py --load reads it.

    Args:
        folder: What --load will name; the step's folder and the tracker file are made in it.
        pieces: Tensors of the model.
        args: Options, under the names of Megatron's argument parser.
        extra_states: Keys of the objects that Megatron's linear layers save beside their weights,
            with their place ("key/shard_0_1"); empty in all precisions but fp8.

    Raises:
        ValueError: What `build` of a piece raises.
        OSError: If the disk is full, say.
    """
    common = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": CONTENT_METADATA,
    }
    # Megatron stores any object as the list of one rank's
    objects: dict[str, Any] = {key: [None] for key in extra_states}
    objects["common_state/shard_0_1"] = [common]
    with warnings.catch_warnings():
        # torch says that it saves on a single process, which is the intent
        warnings.simplefilter("ignore")
        try:
            save(
                objects,
                storage_writer=_ManyFilesWriter(folder / RELEASE),
                planner=_LazyPlanner(pieces),
                no_dist=True,
            )
        except CheckpointException as error:
            raise _find_cause(error, folder) from error
    (folder / RELEASE / "metadata.json").write_text(json.dumps(BACKEND))
    (folder / TRACKER).write_text(RELEASE)


def _find_cause(error: CheckpointException, folder: Path) -> BaseException:
    """What making or writing a tensor has raised first; torch covers a full disk with its own."""
    cause: BaseException = next(iter(error.failures.values()))[0]
    found: BaseException | None = cause
    while found is not None:
        if isinstance(found, ValueError | OSError):
            return found
        found = found.__context__
    if isinstance(cause, RuntimeError):
        reason = str(cause).strip().splitlines()[0]
        return OSError(f"{folder} cannot be written ({reason}). Look whether the disk is full.")
    return cause


class _ManyFilesWriter(FileSystemWriter):
    """Writes one file after the other.

    torch's own (2.13) makes one file, and keeps every tensor of it until it is closed.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes the plan in parts; names continue the writer's own."""
        results: list[WriteResult] = []
        for number, items in enumerate(_split(plan.items)):
            prefix = f"{plan.storage_data.prefix}{number}_"
            storage = replace(plan.storage_data, prefix=prefix)
            part = replace(plan, items=items, storage_data=storage)
            results += super().write_data(part, planner).value()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _split(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    part: list[WriteItem] = []
    size = 0
    for item in items:
        if size >= FILE_SIZE:
            yield part
            part, size = [], 0
        part.append(item)
        if item.tensor_data is not None:
            size += (
                item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
            )
    yield part


class _LazyPlanner(DefaultSavePlanner):
    """Adds tensors that do not exist yet to the plan, and makes each when it is asked for."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(flatten_state_dict=False)
        self.pieces = {_index(piece): piece for piece in pieces}

    def create_local_plan(self) -> SavePlan:
        """One item per piece, after the objects."""
        items = [_write_item(piece) for piece in self.pieces.values()]
        self.plan = replace(plan := super().create_local_plan(), items=plan.items + items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Makes the piece, or finds the object."""
        # the plan's index carries a hint that does not count in comparisons
        piece = self.pieces.get(index)
        if piece is None:
            return super().lookup_object(index)
        tensor = piece.build()
        assert (tuple(tensor.shape), tensor.dtype) == (piece.shape, piece.dtype), piece.key
        return tensor if piece.index is None else tensor.unsqueeze(0)


def _index(piece: Piece) -> MetadataIndex:
    return MetadataIndex(piece.key, piece.chunk.offsets)


def _write_item(piece: Piece) -> WriteItem:
    whole = piece.shape if piece.index is None else (piece.count, *piece.shape)
    data = TensorWriteData(piece.chunk, TensorProperties(piece.dtype), torch.Size(whole))
    return WriteItem(_index(piece), WriteItemType.SHARD, tensor_data=data)
