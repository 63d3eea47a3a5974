"""Chunks of lines to chunks of tokens, in worker processes, in order and with bounded memory."""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process

import numpy as np
import numpy.typing as npt

from megatron_satformer.data.documents import Chunk, iterate_documents
from megatron_satformer.data.indexed import check_ids, token_dtype
from megatron_satformer.data.tokenizers import Tokenizer, TokenizerOptions, build_tokenizer

# Chunks per worker that may be read but not yet written: what bounds memory.
CHUNKS_IN_FLIGHT = 4


@dataclass(frozen=True)
class Encoded:
    """The tokens of one chunk.

    Attributes:
        documents: Lines.
        json_bytes: Their bytes, uncompressed.
        file_bytes: Bytes of the file on disk that they took.
        keys: For each key, ids end to end and the length of each document.
    """

    documents: int
    json_bytes: int
    file_bytes: int
    keys: list[tuple[npt.NDArray, npt.NDArray]]


class ChunkEncoder:
    """Tokenizes chunks; lives in each worker.

    Args:
        tokenizer: The tokenizer.
        keys: Keys of a line, in the order of the output.
        append_eod: Whether each document that is not empty ends with the tokenizer's `eod`.
    """

    def __init__(self, tokenizer: Tokenizer, keys: Sequence[str], append_eod: bool) -> None:
        self.tokenizer = tokenizer
        self.keys = keys
        self.eod = tokenizer.eod if append_eod else None
        self.dtype = token_dtype(tokenizer.vocab_size)

    def encode(self, chunk: Chunk) -> Encoded:
        """Returns the tokens of a chunk.

        Raises:
            ValueError: For the first line that is bad or gives an id outside the vocabulary, with
                its place.
        """
        ids: list[list[npt.NDArray]] = [[] for _ in self.keys]
        lengths: list[list[int]] = [[] for _ in self.keys]
        for place, texts in iterate_documents(chunk, self.keys):
            for index, text in enumerate(texts):
                try:
                    tokens = self._encode_text(text)
                except ValueError as error:
                    raise ValueError(f"{place}: {error}. Correct or remove the line.") from None
                ids[index].append(tokens)
                lengths[index].append(tokens.size)
        return Encoded(
            len(chunk.lines),
            sum(map(len, chunk.lines)),
            chunk.file_bytes,
            [
                (np.concatenate(documents), np.array(counts, dtype=np.int64))
                for documents, counts in zip(ids, lengths, strict=True)
            ],
        )

    def _encode_text(self, text: str) -> npt.NDArray:
        tokens = self.tokenizer.encode(text)
        if tokens and self.eod is not None:
            tokens.append(self.eod)
        try:
            wide = np.array(tokens, dtype=np.int64)
        except OverflowError:
            raise ValueError(f"token id {max(tokens, key=abs)} is beyond any vocabulary") from None
        check_ids(wide, self.tokenizer.vocab_size)
        return wide.astype(self.dtype)


_encoder: ChunkEncoder


def _start_worker(options: TokenizerOptions, keys: Sequence[str], append_eod: bool) -> None:
    global _encoder
    # ctrl-C reaches the whole process group: the parent alone decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _encoder = ChunkEncoder(build_tokenizer(options), keys, append_eod)


def _exit_with_parent() -> None:
    # A killed parent cannot stop its workers, and they would wait for work for ever.
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(chunk: Chunk) -> Encoded:
    return _encoder.encode(chunk)


def encode_in_order(
    chunks: Iterator[Chunk],
    options: TokenizerOptions,
    keys: Sequence[str],
    append_eod: bool,
    workers: int,
) -> Iterator[Encoded]:
    """Yields the tokens of each chunk, in order, from `workers` processes; this one alone if 1.

    Raises:
        ValueError: For the first bad line, or if a worker dies.
    """
    if workers == 1:
        encoder = ChunkEncoder(build_tokenizer(options), keys, append_eod)
        yield from map(encoder.encode, chunks)
        return
    # spawn: safe whatever threads this process has, and a worker inherits nothing it does not need.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(options, keys, append_eod),
    )
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) >= workers * CHUNKS_IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError(
            f"workers ({workers}): one of them died (out of memory, or killed). Nothing was "
            "written. Use fewer --workers, or look in the system log for what killed it."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
