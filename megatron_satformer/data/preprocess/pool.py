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

from megatron_satformer.data.preprocess.encoding import ChunkEncoder, Encoded, EncodingOptions
from megatron_satformer.data.reading.chunks import Chunk
from megatron_satformer.data.tokenizers.exact import Tokenizer
from megatron_satformer.data.tokenizers.hugging_face import hide_torch

# Chunks per worker that may be read but not yet written: what bounds memory.
CHUNKS_IN_FLIGHT = 3

_encoder: ChunkEncoder


class WorkerDiedError(Exception):
    """A worker process is gone."""


class ChunkError(Exception):
    """The first chunk whose tokens are missing, and why they are."""

    def __init__(self, chunk: Chunk, cause: Exception) -> None:
        super().__init__(chunk.path, cause)
        self.chunk, self.cause = chunk, cause


def _start_worker(options_file: str) -> None:
    global _encoder
    # ctrl-C reaches the whole process group: the parent alone decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    hide_torch()
    _encoder = ChunkEncoder(pickle.loads(Path(options_file).read_bytes()))


def _exit_with_parent() -> None:
    # A killed parent cannot stop its workers, and they would wait for work for ever.
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(number: int, chunk: Chunk) -> Encoded:
    return _encoder.encode(number, chunk)


def encode_in_order(
    chunks: Iterable[tuple[int, Chunk]],
    options: EncodingOptions,
    workers: int,
    reference: Tokenizer | None = None,
) -> Iterator[tuple[int, Chunk, Encoded]]:
    """Yields each chunk with its tokens, in order, from `workers` processes; this one alone if 1.

    Args:
        chunks: Number and chunk.
        options: For the workers.
        workers: Number of processes.
        reference: A tokenizer that exists already, for this process.

    Raises:
        ChunkError: For whatever ChunkEncoder.encode raises, or WorkerDiedError.
    """
    if workers == 1:
        encoder = ChunkEncoder(options, reference)
        for number, chunk in chunks:
            try:
                encoded = encoder.encode(number, chunk)
            except Exception as error:
                raise ChunkError(chunk, error) from error
            yield number, chunk, encoded
        return
    with NamedTemporaryFile(prefix="tokenizer-") as file:
        # Not through the pipe: a process that dies before it has read a tokenizer's megabytes
        # there would leave this one waiting for ever.
        file.write(pickle.dumps(options))
        file.flush()
        yield from _encode_in_pool(chunks, file.name, workers)


def _encode_in_pool(
    chunks: Iterable[tuple[int, Chunk]], options_file: str, workers: int
) -> Iterator[tuple[int, Chunk, Encoded]]:
    # spawn: safe whatever threads this process has, and a worker inherits nothing it does not need.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(options_file,),
    )
    waiting: deque[tuple[int, Chunk, Future[Encoded]]] = deque()
    try:
        for number, chunk in chunks:
            try:
                waiting.append((number, chunk, pool.submit(_encode_in_worker, number, chunk)))
            except BrokenProcessPool:
                first = waiting[0][1] if waiting else chunk
                raise ChunkError(first, WorkerDiedError()) from None
            if len(waiting) >= workers * CHUNKS_IN_FLIGHT:
                yield _next(waiting)
        while waiting:
            yield _next(waiting)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _next(
    waiting: deque[tuple[int, Chunk, Future[Encoded]]],
) -> tuple[int, Chunk, Encoded]:
    number, chunk, future = waiting.popleft()
    try:
        return number, chunk, future.result()
    except BrokenProcessPool:
        raise ChunkError(chunk, WorkerDiedError()) from None
    except Exception as error:
        raise ChunkError(chunk, error) from error
