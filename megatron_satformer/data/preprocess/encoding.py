"""A chunk of documents to tokens: what a worker does.

With a fast tokenizer, documents of a kind it is known to get wrong go to the exact one, and a
random sample of the others is encoded by both. The ids must be equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_satformer.data.datasets.indexed import token_dtype
from megatron_satformer.data.preprocess.options import PreprocessOptions
from megatron_satformer.data.reading.chunks import Chunk
from megatron_satformer.data.reading.documents import EXCERPT, Reader, Rejected, build_reader
from megatron_satformer.data.tokenizers.exact import Tokenizer, build_tokenizer
from megatron_satformer.data.tokenizers.fast import FastTokenizer
from megatron_satformer.data.tokenizers.hugging_face import BackendTokenizer

# The index holds lengths in 32 bits.
MOST_TOKENS = 2**31 - 1
# Attributes of ChunkEncoder.
BUILT_ANEW = ("exact", "fast", "read")


class BadDocumentError(ValueError):
    """A document that cannot be used: its place in the chunk, from 0, and the reason."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(offset, reason)
        self.offset, self.reason = offset, reason


class MismatchError(Exception):
    """The fast tokenizer gave other ids than the exact one: place in the chunk, and what it saw."""

    def __init__(self, offset: int, excerpt: str) -> None:
        super().__init__(offset, excerpt)
        self.offset, self.excerpt = offset, excerpt


@dataclass(frozen=True)
class KeyTokens:
    """The tokens of one key of a chunk.

    Attributes:
        ids: Ids end to end, in the dtype of the output. [sum(lengths)]
        lengths: Number of ids of each document, int32. [documents]
        empty: Documents without a token; they are in `lengths` only if empty ones are kept.
        largest: The largest id, -1 if there is none.
    """

    ids: npt.NDArray
    lengths: npt.NDArray[np.int32]
    empty: int
    largest: int


@dataclass(frozen=True)
class Encoded:
    """The tokens of one chunk.

    Attributes:
        documents: Documents read, bad and empty ones included.
        text_bytes: Their bytes in the input, uncompressed.
        keys: One for each key.
        rejected: The bad documents.
        verified: Documents (of one key) that both tokenizers encoded.
        routed: Documents (of one key) that went to the exact tokenizer by their kind.
    """

    documents: int
    text_bytes: int
    keys: list[KeyTokens]
    rejected: list[Rejected]
    verified: int
    routed: int


class ChunkEncoder:
    """Tokenizes chunks. A worker builds its tokenizers anew, all but what pickles.

    Args:
        options: Of the run.

    Attributes:
        vocab_size: Size of the vocabulary.
        dtype: Of the tokens in the data set.
        end: Id that ends every document that is not empty, or None.
        pipeline: What FastTokenizer is built from; None is the exact tokenizer alone.

    Raises:
        ValueError: If the options make no tokenizer, or it has no end-of-sequence token to append.
    """

    def __init__(self, options: PreprocessOptions) -> None:
        self.options = options
        self.vocab_size = self.exact.vocab_size
        self.dtype = token_dtype(self.vocab_size)
        self.end = _end_of(self.exact, options) if options.append_eod else None
        self.pipeline: str | None = None
        self._verified = self._routed = 0

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in BUILT_ANEW}
        backend = getattr(self.exact, "fast", self.exact)
        return {**state, "exact": backend} if isinstance(backend, BackendTokenizer) else state

    @cached_property
    def exact(self) -> Tokenizer:
        """The exact tokenizer, built when it is first needed."""
        return build_tokenizer(self.options.tokenizer)

    @cached_property
    def fast(self) -> FastTokenizer:
        """The fast tokenizer."""
        assert self.pipeline is not None
        return FastTokenizer(self.pipeline)

    @cached_property
    def read(self) -> Reader:
        """Chunks to documents."""
        return build_reader(self.options.json_keys)

    def encode(self, chunk: Chunk) -> Encoded:
        """Returns the tokens of a chunk, whose number seeds the choice of documents to verify.

        Raises:
            BadDocumentError: For the first bad document, unless bad ones are skipped.
            MismatchError: For a document whose ids differ.
        """
        stops = self.options.on_error == "stop"
        texts: list[list[str]] = [[] for _ in self.options.json_keys]
        bad: dict[int, Rejected] = {}
        places: list[int] = []
        for offset, found in enumerate(self.read(chunk)):
            if isinstance(found, Rejected):
                bad[offset] = found
                if stops:
                    break
                continue
            places.append(offset)
            for target, text in zip(texts, found, strict=True):
                target.append(text)
        documents = len(places) + len(bad)
        self._verified = self._routed = 0
        random = np.random.default_rng(chunk.number)
        encoded = [self._encode_key(key_texts, places, bad, random) for key_texts in texts]
        if bad and stops:
            first = bad[min(bad)]
            raise BadDocumentError(first.offset, first.reason)
        good = np.array([place not in bad for place in places], dtype=bool)
        return Encoded(
            documents,
            chunk.text_bytes,
            [self._finish(ids, lengths, good) for ids, lengths in encoded],
            [bad[offset] for offset in sorted(bad)],
            self._verified,
            self._routed,
        )

    def _encode_key(
        self,
        texts: list[str],
        places: list[int],
        bad: dict[int, Rejected],
        random: np.random.Generator,
    ) -> tuple[npt.NDArray, npt.NDArray[np.int64]]:
        """Ids and lengths of the texts of one key; adds to `bad` what cannot be encoded."""
        if self.pipeline is None:
            ids, lengths, failed = self._encode_exactly(texts)
        else:
            ids, lengths, failed = self._encode_fast(texts, places, random)
        ends = np.cumsum(lengths)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            for position in np.flatnonzero((ids < 0) | (ids >= self.vocab_size)):
                failed.setdefault(
                    int(np.searchsorted(ends, position, side="right")),
                    f"token id {ids[position]} must be in [0, {self.vocab_size}), the "
                    "tokenizer's vocabulary",
                )
        most = MOST_TOKENS - (self.end is not None)
        for document in np.flatnonzero(lengths > most).tolist():
            failed[document] = (
                f"the document has {lengths[document]} tokens, more than a document of the "
                f"format can hold ({MOST_TOKENS}); cut it in pieces"
            )
        for document, reason in failed.items():
            offset = places[document]
            bad.setdefault(offset, Rejected(offset, reason, texts[document][:EXCERPT]))
        return ids, lengths

    def _encode_exactly(
        self, texts: Sequence[str]
    ) -> tuple[npt.NDArray, npt.NDArray[np.int64], dict[int, str]]:
        failed: dict[int, str] = {}
        try:
            documents = self.exact.encode_batch(texts)
        except ValueError:
            # One of them cannot be encoded: find out which.
            documents = []
            for index, text in enumerate(texts):
                try:
                    documents.append(self.exact.encode(text))
                except ValueError as error:
                    failed[index] = str(error)
                    documents.append([])
        lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
        ids = np.empty(int(lengths.sum()), dtype=np.int64)
        position = 0
        for index, tokens in enumerate(documents):
            try:
                ids[position : position + len(tokens)] = tokens
            except OverflowError:
                ids[position : position + len(tokens)] = -1
                failed[index] = f"token id {max(tokens, key=abs)} is beyond any vocabulary"
            position += len(tokens)
        return ids, lengths, failed

    def _encode_fast(
        self, texts: list[str], places: list[int], random: np.random.Generator
    ) -> tuple[npt.NDArray, npt.NDArray[np.int64], dict[int, str]]:
        taken = np.fromiter(map(self.fast.takes, texts), dtype=bool, count=len(texts))
        chosen = texts if taken.all() else list(compress(texts, taken))
        try:
            ids, lengths = self.fast.encode_batch(chosen)
        except ValueError:
            # Its regex engine gives up on some texts.
            ids, lengths = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
            taken[:] = False
        failed: dict[int, str] = {}
        others = np.flatnonzero(~taken)
        if others.size:
            fast_ids, fast_lengths = ids, lengths
            slow_ids, slow_lengths, slow_failed = self._encode_exactly(
                [texts[index] for index in others]
            )
            lengths = np.empty(len(texts), dtype=np.int64)
            lengths[taken], lengths[others] = fast_lengths, slow_lengths
            from_fast = np.repeat(taken, lengths)
            ids = np.empty(from_fast.size, dtype=np.int64)
            ids[from_fast], ids[~from_fast] = fast_ids, slow_ids
            failed = {int(others[index]): reason for index, reason in slow_failed.items()}
        sample = np.flatnonzero(taken & (random.random(len(texts)) < self.options.verify_fraction))
        if sample.size:
            self._verify(texts, places, sample, ids, lengths)
        self._verified += int(sample.size)
        self._routed += int(others.size)
        return ids, lengths, failed

    def _verify(
        self,
        texts: list[str],
        places: list[int],
        sample: npt.NDArray[np.intp],
        ids: npt.NDArray,
        lengths: npt.NDArray[np.int64],
    ) -> None:
        ends = np.cumsum(lengths)
        expected, counts, _ = self._encode_exactly([texts[index] for index in sample])
        starts = np.cumsum(counts) - counts
        for index, start, count in zip(sample, starts, counts, strict=True):
            got = ids[ends[index] - lengths[index] : ends[index]]
            if not np.array_equal(got, expected[start : start + count]):
                raise MismatchError(places[index], texts[index][:EXCERPT])

    def _finish(
        self, ids: npt.NDArray, lengths: npt.NDArray[np.int64], good: npt.NDArray[np.bool_]
    ) -> KeyTokens:
        """Drops what is bad or empty, and ends the documents."""
        if not good.all():
            ids, lengths = ids[np.repeat(good, lengths)], lengths[good]
        present = lengths > 0
        empty = int(lengths.size - present.sum())
        if empty and not self.options.keep_empty:
            lengths, present = lengths[present], present[present]
        largest = int(ids.max()) if ids.size else -1
        ids = ids.astype(self.dtype)
        if self.end is not None and ids.size:
            ids = np.insert(ids, np.cumsum(lengths)[present], self.end)
            lengths = lengths + present
            largest = max(largest, self.end)
        return KeyTokens(ids, lengths.astype(np.int32), empty, largest)


def _end_of(tokenizer: Tokenizer, options: PreprocessOptions) -> int:
    if tokenizer.eod is None:
        raise ValueError(
            "append_eod needs a tokenizer with an end-of-sequence token; "
            f"{options.tokenizer.tokenizer_model} has none. Use one that has (for a "
            "tokenizer.json: its whole folder), or leave the flag out."
        )
    if not 0 <= tokenizer.eod < tokenizer.vocab_size:
        raise ValueError(
            f"append_eod needs an end-of-sequence token inside the vocabulary; {tokenizer.eod} is "
            f"not in [0, {tokenizer.vocab_size}). Use another tokenizer, or leave the flag out."
        )
    return tokenizer.eod
