"""Reads `torch_dist` checkpoints of Megatron on one CPU process, without any process group.

Whatever layout saved it, a checkpoint holds whole tensors in pieces; torch's checkpoint reader puts
them together. Only what is asked for is read: the optimizer's state stays on disk. Must not know:
what the tensors mean.
"""

import json
import logging
import re
import warnings
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    FileSystemReader,
    LoadPlan,
    Metadata,
    TensorStorageMetadata,
    load,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_satformer.checkpoint.megatron.checksums import (
    find_changed_lists,
    find_changed_pieces,
)
from megatron_satformer.checkpoint.megatron.damage import find_damage
from megatron_satformer.checkpoint.tensor_names import list_problems

# Megatron's imports make torch look for a CUDA compiler, and say so where one is without a GPU
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # the folder, and the word in the tracker, of weights without a step
STEP_FOLDER = "iter_{step:07d}"
# keys of the model: everything else (optimizer, random state, scheduler, common state) has others
MODEL_KEY = re.compile(r"(embedding|decoder|output_layer)\.(?!.*(_extra_state|optimizer))")


@dataclass(frozen=True)
class MegatronCheckpoint:
    """One saved step, opened for reading.

    Attributes:
        folder: The step's own folder.
        step: Training iterations done.
        args: The command line that trained it, under Megatron's names.
        tensors: Key -> shape and dtype, for the tensors of the model alone.
        metadata: Of torch's checkpoint format: where every piece lies.
        schedule: State of the learning rate's scheduler; None where it was not saved.
    """

    folder: Path
    step: int
    args: Namespace
    tensors: Mapping[str, TensorStorageMetadata]
    metadata: Metadata = field(repr=False)
    schedule: Mapping[str, Any] | None = None

    @property
    def has_optimizer(self) -> bool:
        """Whether the optimizer's state was saved."""
        # Of several, as with experts or Muon, each has a number: chained_0.optimizer.
        return any(
            re.match(r"(chained_\d+\.)?optimizer\.", key)
            for key in self.metadata.state_dict_metadata
        )

    def read(self, key: str, index: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Reads one tensor.

        Args:
            key: One of `tensors`.
            index: Of the first axis: read this slice alone and drop the axis.
            dtype: To convert to while reading; None keeps the checkpoint's.

        Returns:
            The whole tensor, or the slice, on the CPU.

        Raises:
            ValueError: If its place in the files is damaged.
        """
        stored = self.tensors[key]
        offsets, sizes = [0] * len(stored.size), list(stored.size)
        if index is not None:
            offsets[0], sizes[0] = index, 1
        buffer = torch.empty(sizes, dtype=dtype or stored.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        with warnings.catch_warnings():
            # torch says that it reads on a single process, which is the intent
            warnings.simplefilter("ignore")
            try:
                load(
                    {key: buffer},
                    storage_reader=_KnownMetadataReader(self.folder, self.metadata),
                    planner=_ChunkPlanner(chunk),
                    no_dist=True,
                )
            except CheckpointException as error:
                cause = next(iter(error.failures.values()))[0]
                raise ValueError(
                    f"{key} in {self.folder} cannot be read ({type(cause).__name__}: "
                    f"{str(cause).split('. ')[0]}). Copy the checkpoint again, or use another step."
                ) from error
        return buffer if index is None else buffer.squeeze(0)

    def check_files(self) -> None:
        """Looks whether every piece of the model is there, and as it was written.

        Raises:
            ValueError: Names those that are not.
        """
        wanted = self.tensors.__contains__
        damage = find_damage(self.folder, self.metadata, wanted) or find_changed_lists(self.folder)
        damage = damage or find_changed_pieces(self.folder, self.metadata, wanted)
        if damage:
            raise ValueError(f"{list_problems(damage)}.")


class _KnownMetadataReader(FileSystemReader):
    """Does not read the list of all pieces, optimizer included, once more for every tensor."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns what was read at the start."""
        return self.metadata


class _ChunkPlanner(DefaultLoadPlanner):
    """Reads one box of each tensor into a buffer of the box's size, in the buffer's dtype."""

    def __init__(self, chunk: ChunkStorageMetadata) -> None:
        super().__init__()
        self.chunk = chunk

    def create_local_plan(self) -> LoadPlan:
        """Reads, for every stored piece that overlaps the box, the overlap."""
        items = []
        assert self.metadata is not None
        for key in self.state_dict:
            stored = self.metadata.state_dict_metadata[key]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(key, stored, [self.chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Returns the buffer itself; torch narrows it to the piece."""
        return self.state_dict[index.fqn]


def list_steps(load_dir: Path) -> list[int]:
    """Lists the steps that have a folder, whole or not, in their order."""
    return sorted(int(f.name[5:]) for f in load_dir.glob("iter_*") if f.name[5:].isdecimal())


def _find_step_folder(load_dir: Path, step: int | None) -> Path:
    """Raises ValueError if there is no such checkpoint; says which there are."""
    if not load_dir.is_dir():
        raise ValueError(f"load ({load_dir}) must be a folder of checkpoints, and there is none.")
    if (load_dir / ".metadata").is_file():
        if step is not None and STEP_FOLDER.format(step=step) != load_dir.name:
            raise ValueError(
                f"step ({step}) must not be given with one step's folder ({load_dir})."
            )
        return load_dir
    steps = list_steps(load_dir)
    if step is None:
        tracker = load_dir / TRACKER
        if not tracker.is_file() and not steps:
            kind = "a Hugging Face folder" if (load_dir / "config.json").is_file() else "none"
            raise ValueError(
                f"load ({load_dir}) must be a folder of checkpoints, and is {kind}: it has neither "
                f"{TRACKER} nor iter_* in it."
            )
        if not tracker.is_file():
            raise ValueError(
                f"load ({load_dir}) has no {TRACKER}: no save was completed there. "
                f"Steps found: {steps or 'none'}."
            )
        latest = tracker.read_text().strip()
        if latest == RELEASE:
            return load_dir / RELEASE
        if not latest.isdigit():
            raise ValueError(f"{tracker} must hold a number, not {latest!r}.")
        step = int(latest)
    folder = load_dir / STEP_FOLDER.format(step=step)
    if not folder.is_dir():
        raise ValueError(f"step ({step}) must be one of those in {load_dir}: {steps or 'none'}.")
    return folder


def open_checkpoint(load_dir: Path, step: int | None = None) -> MegatronCheckpoint:
    """Opens a checkpoint and reads its options and its list of tensors.

    Args:
        load_dir: What `--save` of the training run named, or a step's own folder.
        step: Iterations; None for the last one saved.

    Raises:
        ValueError: If there is none, it is not complete, or not of format torch_dist.
    """
    folder = _find_step_folder(load_dir, step)
    _check_format(folder)
    try:
        # first: what Megatron reads needs it too, and says less where it is damaged
        metadata = FileSystemReader(folder).read_metadata()
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(
            f"{folder / '.metadata'} cannot be read ({type(error).__name__}: {error}): it is cut "
            "short or damaged. Copy it again, or use another step."
        ) from error
    common = _read_common_state(folder)
    tensors = {
        key: stored
        for key, stored in metadata.state_dict_metadata.items()
        if MODEL_KEY.match(key) and isinstance(stored, TensorStorageMetadata)
    }
    if "args" not in common:
        raise ValueError(f"{folder} holds no args: it was not saved by a training run.")
    step, schedule = common.get("iteration", 0), common.get("opt_param_scheduler")
    return MegatronCheckpoint(folder, step, common["args"], tensors, metadata, schedule)


def _check_format(folder: Path) -> None:
    if any(folder.glob("mp_rank_*")):
        raise ValueError(
            f"{folder} is a checkpoint of format torch (mp_rank_*), which depends on its layout. "
            "Load it in training and save with --ckpt-format torch_dist."
        )
    if not (folder / ".metadata").is_file() or not (folder / "metadata.json").is_file():
        raise ValueError(
            f"{folder} is not a complete checkpoint of format torch_dist: its .metadata or "
            "metadata.json is missing. Save with --ckpt-format torch_dist, or use another step."
        )
    try:
        kind = json.loads((folder / "metadata.json").read_text("utf-8"))["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / 'metadata.json'} cannot be read ({type(error).__name__}: {error}): it is "
            "cut short or damaged. Copy it again, or use another step."
        ) from None
    if kind != "torch_dist":
        raise ValueError(
            f"{folder} is a checkpoint of format {kind}. Load it in training and save with "
            "--ckpt-format torch_dist."
        )


def _read_common_state(folder: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        # Megatron's optional parts that are not installed, and torch's single process
        warnings.simplefilter("ignore")
        from megatron.core.dist_checkpointing import load_common_state_dict
        from megatron.core.dist_checkpointing.core import CheckpointingException

        try:
            return load_common_state_dict(str(folder))
        except (CheckpointException, CheckpointingException, OSError) as error:
            reason = str(error).strip().splitlines()[-1:]
            raise ValueError(f"{folder} cannot be read: {' '.join(reason)}") from error
