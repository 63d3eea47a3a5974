"""Takes the checksums of a checkpoint while Megatron writes it; `checksums` compares them.

Each rank sums the bytes on their way to the file, so that none is read again. Must not know: which
step is saved, and what becomes of it.
"""

import json
import zlib
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_satformer.checkpoint.megatron.checksums import CHECKSUMS, LISTS, sum_bytes
from megatron_satformer.files.atomic import sync, write_atomically

_Writer = filesystem_async.FileSystemWriterAsync
_plain_write_item = filesystem_async._write_item
_plain_write_file = _Writer.write_preloaded_data
_plain_plan = _Writer.get_save_function_and_args
_plain_finish = serialization.save_config


def activate() -> None:
    """Let Megatron's saves, synchronous or not, record what they write."""
    _Writer.get_save_function_and_args = _plan_writing
    serialization.save_config = _finish


class _SummedStream:
    """The part of a file's interface that torch writes a piece through."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.crc32 = 0
        self.failure: OSError | None = None

    def write(self, content: Any) -> int:
        self.crc32 = zlib.crc32(content, self.crc32)
        try:
            return self._stream.write(content)
        except OSError as error:
            self.failure = error  # torch makes an error of its own of it, without its reason
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# FileSystemWriterAsync's, 0.19.2: what it returns may run in another process, which is to sum too.
def _plan_writing(writer: Any) -> tuple[Any, Any, list[Any]]:
    write, preload, arguments = _plain_plan(writer)
    return write and partial(write_summed, write), preload, arguments


def write_summed(write: Callable[..., None], *arguments: Any) -> None:
    """Writes a rank's files; found by its name where a worker process writes them.

    Args:
        write: Megatron's function.
        arguments: Its own, the last of them the queue that takes what it has written.
    """
    results = _Results(arguments[-1])
    filesystem_async._write_item = _write_item
    _Writer.write_preloaded_data = staticmethod(partial(_write_file, results))
    try:
        write(*arguments[:-1], results)
    finally:
        filesystem_async._write_item = _plain_write_item
        _Writer.write_preloaded_data = staticmethod(_plain_write_file)


class _Results:
    """The queue; of what has failed Megatron (0.19.2) would hand on the exception's class alone."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self.failure: RuntimeError | None = None

    def put(self, result: Any) -> None:
        self._queue.put(self.failure or result)


def _write_file(results: _Results, *args: Any, **options: Any) -> Any:
    written = _plain_write_file(*args, **options)
    if written is not None and isinstance(error := written[1], Exception):
        why = getattr(error, "strerror", None) or error
        results.failure = RuntimeError(f"{options['write_bucket'][0]}: {why}")
    return written


@wraps(_plain_write_item)  # Megatron looks at its signature
def _write_item(transforms: Any, stream: Any, *args: Any, **options: Any) -> Any:
    summed = _SummedStream(stream)
    try:
        written = _plain_write_item(transforms, summed, *args, **options)
    except Exception as error:
        raise summed.failure or error from None
    written.storage_data.crc32 = summed.crc32
    return written


# dist_checkpointing's save_config, 0.19.2: called on rank 0 when all else of a step is on disk.
def _finish(config: Any, checkpoint_dir: Any) -> None:
    _plain_finish(config, checkpoint_dir)
    folder = Path(checkpoint_dir)
    if not folder.is_dir():  # in an object store
        return
    sync(folder / "metadata.json")
    sums = {name: sum_bytes(folder / name) for name in LISTS}
    write_atomically(folder / CHECKSUMS, json.dumps({"crc32": sums}).encode())
