"""What a save of Megatron's (0.19.2) does besides writing: nothing it touches is ever half done.

Megatron writes into a step's folder whatever is in it, and the tracker in place. Here a step is
written into a folder of its own, is brought to disk, and only then named by the tracker, which is
replaced as a whole; then older steps go. What fails is told in one line, and leaves the steps
before it as they are. All of it hangs on three names of Megatron's: `save_checkpoint`,
`maybe_finalize_async_save`, and the `maybe_msc` that opens the tracker.
"""

import io
import queue
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.training import checkpointing, training
from megatron.training.async_utils import is_empty_async_queue
from torch.distributed.checkpoint.api import CheckpointException

from megatron_satformer.checkpoint.megatron import recording
from megatron_satformer.checkpoint.megatron.reader import STEP_FOLDER, TRACKER
from megatron_satformer.checkpoint.megatron.retention import (
    choose_steps_to_remove,
    drop_replaced,
    make_room,
    remove_step,
)
from megatron_satformer.files.atomic import sync, write_atomically

_plain_save = training.save_checkpoint
_plain_finalize = training.maybe_finalize_async_save
_plain_files = checkpointing.maybe_msc


def activate(args: Namespace, telling: Callable[[], AbstractContextManager[None]]) -> None:
    """Let every save of a run keep to this; a second call starts anew.

    Args:
        args: Validated; --save-retain-interval is taken over from Megatron, which would keep one
            step besides.
        telling: Makes one line of an error that is raised in it, and ends the process.
    """
    if args.save is None or "://" in args.save:
        return
    saves = _Saves(args, telling)
    checkpointing.maybe_msc = _Files(saves.settle)
    if args.ckpt_format != "torch_dist":
        return
    args.save_retain_interval = None
    training.save_checkpoint = saves.save
    training.maybe_finalize_async_save = saves.finalize
    recording.activate()
    if not args.async_save:
        # Of processes, Megatron's takes seconds to start and outlives a kill; here one thread fills
        # it and another reads.
        filesystem_async._results_queue = queue.Queue()


class _Saves:
    """The saves of one run."""

    def __init__(
        self, args: Namespace, telling: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.args, self.first = args, args.rank == 0
        own = args.ckpt_format == "torch_dist"  # of another, Megatron removes old steps itself
        self.every = args.save_retain_interval if own else None
        self.keep_last = args.keep_last or (1 if self.every else None)
        self.telling = telling
        self.written: list[int] = []  # steps that no tracker names yet; several with --async-save
        self.removal: threading.Thread | None = None

    @property
    def folder(self) -> Path:
        """Where to; --ckpt-convert-save changes it."""
        return Path(self.args.save)

    def save(self, iteration: int, *args: Any, **options: Any) -> None:
        """In place of Megatron's save_checkpoint."""
        with self._failures():
            if self.args.ckpt_format == "torch_dist" and not options.get("non_persistent_ckpt"):
                self.written.append(iteration)
                if self.first:
                    make_room(self.folder / STEP_FOLDER.format(step=iteration))
                torch.distributed.barrier()  # before a rank writes into it
            _plain_save(iteration, *args, **options)

    def finalize(self, *args: Any, **options: Any) -> None:
        """In place of maybe_finalize_async_save, which meets the errors of --async-save."""
        with self._failures():
            _plain_finalize(*args, **options)

    def settle(self, load: Path, named: str) -> None:
        """What is to be done, on rank 0, when the tracker names a step."""
        if load != self.folder or not named.isdecimal():
            return
        self.written = [step for step in self.written if step > int(named)]
        drop_replaced(load / STEP_FOLDER.format(step=int(named)))
        if self.keep_last is None:
            return
        if self.removal is not None:
            self.removal.join()
        old = choose_steps_to_remove(load, int(named), self.keep_last, self.every)
        # Beside the training, as Megatron does it: large folders go slowly.
        self.removal = threading.Thread(target=_remove_steps, args=[old])
        self.removal.start()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except (CheckpointException, OSError) as error:
            why = _cause(error)
        else:
            if is_empty_async_queue():
                self.written.clear()
            return
        failed = f" of step {self.written[0]}" if self.written else ""
        if self.first:  # what is there of it is no use, and in the way on a full disk
            _remove_steps([self.folder / STEP_FOLDER.format(step=step) for step in self.written])
        with self.telling():
            raise OSError(
                f"save ({self.folder}) must take the checkpoint{failed}, and cannot: {why}. "
                f"{_what_is_left(self.folder)} Mend that, and start again; where the disk is full, "
                "--keep-last N keeps fewer steps."
            )


def _remove_steps(folders: list[Path]) -> None:
    for folder in folders:
        remove_step(folder)


def _cause(error: CheckpointException | OSError) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    for rank, (failure, _) in sorted(error.failures.items()):
        return f"{str(failure).removeprefix('Worker failure: ')} (rank {rank})"
    return "another rank could not write its part"


def _what_is_left(folder: Path) -> str:
    tracker = folder / TRACKER
    if not tracker.is_file():
        return "No step was saved before."
    return f"That of step {tracker.read_text().strip()} is as it was."


class _Files:
    """Megatron's file access in checkpointing, which here replaces the tracker as a whole."""

    def __init__(self, settle: Callable[[Path, str], None]) -> None:
        self._settle = settle

    def open(self, path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode == "w" and Path(path).name == TRACKER:
            return self._replace(Path(path))
        return _plain_files.open(path, mode, *args, **options)

    @contextmanager
    def _replace(self, tracker: Path) -> Iterator[io.StringIO]:
        content = io.StringIO()
        yield content
        named = content.getvalue()
        if named.isdecimal():
            sync(tracker.parent / STEP_FOLDER.format(step=int(named)))
            sync(tracker.parent)
        write_atomically(tracker, named.encode())
        self._settle(tracker.parent, named)

    def __getattr__(self, name: str) -> Any:
        return getattr(_plain_files, name)
