"""Worker processes that tokenize chunks, in order and with bounded memory."""

import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from tempfile import NamedTemporaryFile

from megatron_satformer.data.preprocess.encoding import ChunkEncoder, Encoded
from megatron_satformer.data.reading.chunks import Chunk
from megatron_satformer.data.tokenizers.hugging_face import hide_torch

# Chunks per worker that may be read but not yet written: what bounds memory.
CHUNKS_IN_FLIGHT = 3

_encoder: ChunkEncoder


class WorkerDiedError(Exception):
    """A worker process is gone."""


class ChunkError(Exception):
    """The first chunk whose tokens are missing, and why they are."""

    def __init__(self, chunk: Chunk, cause: Exception) -> None:
        super().__init__(chunk.source.path, cause)
        self.chunk, self.cause = chunk, cause


def _start_worker(encoder_file: str) -> None:
    global _encoder
    # ctrl-C reaches the whole process group: the parent alone decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    hide_torch()
    _encoder = pickle.loads(Path(encoder_file).read_bytes())


def _exit_with_parent() -> None:
    # A killed parent cannot stop its workers, and they would wait for work for ever.
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(chunk: Chunk) -> Encoded:
    return _encoder.encode(chunk)


def encode_in_order(
    chunks: Iterable[Chunk], encoder: ChunkEncoder, workers: int
) -> Iterator[tuple[Chunk, Encoded]]:
    """Yields each chunk with its tokens, in order, from `workers` processes; this one alone if 1.

    Raises:
        ChunkError: For whatever ChunkEncoder.encode raises, or WorkerDiedError.
    """
    if workers == 1:
        for chunk in chunks:
            try:
                encoded = encoder.encode(chunk)
            except Exception as error:
                raise ChunkError(chunk, error) from error
            yield chunk, encoded
        return
    with NamedTemporaryFile(prefix="tokenizer-") as file:
        # Not through the pipe: a process that dies before it has read a tokenizer's megabytes
        # there would leave this one waiting for ever.
        file.write(pickle.dumps(encoder))
        file.flush()
        yield from _encode_in_pool(chunks, file.name, workers)


def _encode_in_pool(
    chunks: Iterable[Chunk], encoder_file: str, workers: int
) -> Iterator[tuple[Chunk, Encoded]]:
    # spawn: safe whatever threads this process has, and a worker inherits nothing it does not need.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(encoder_file,),
    )
    waiting: deque[tuple[Chunk, Future[Encoded]]] = deque()
    try:
        for chunk in chunks:
            try:
                waiting.append((chunk, pool.submit(_encode_in_worker, chunk)))
            except BrokenProcessPool:
                first = waiting[0][0] if waiting else chunk
                raise ChunkError(first, WorkerDiedError()) from None
            if len(waiting) >= workers * CHUNKS_IN_FLIGHT:
                yield _next(waiting)
        while waiting:
            yield _next(waiting)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _next(waiting: deque[tuple[Chunk, Future[Encoded]]]) -> tuple[Chunk, Encoded]:
    chunk, future = waiting.popleft()
    try:
        return chunk, future.result()
    except BrokenProcessPool:
        raise ChunkError(chunk, WorkerDiedError()) from None
    except Exception as error:
        raise ChunkError(chunk, error) from error
