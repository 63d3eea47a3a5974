r"""Megatron's indexed token files, written and read exactly: `<prefix>.bin` and `<prefix>.idx`.

`.bin` is every document's tokens, end to end. `.idx` is

    9 bytes   magic "MMIDIDX\0\0"
    u64       version, 1
    u8        dtype code of the tokens
    u64, u64  number of sequences n, number of document boundaries d
    i32[n]    sequence lengths, in tokens
    i64[n]    where each sequence starts in .bin, in bytes
    i64[d]    first sequence of each document, then n

all little-endian. We write one sequence per document; a document without tokens has none, as with
Megatron's own tool. Source: megatron/core/datasets/indexed_dataset.py (0.19.2).
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
CODES = {np.dtype(name): code for code, name in DTYPES.items()}
# Rows of an index looked at in one go: bounds memory, not speed.
BLOCK = 1 << 20
REMAKE = "Copy it again in full, or make it again with tools/preprocess_data.py."


def token_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """Returns the dtype that Megatron stores tokens of this vocabulary in (DType.optimal_dtype)."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    """Returns the path of the tokens of the data set `prefix`."""
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    """Returns the path of the index of the data set `prefix`."""
    return Path(f"{os.fspath(prefix)}.idx")


def check_output_free(prefix: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuses to write over a data set.

    A lone `.bin` with our complete-but-not-renamed `.idx.partial` beside it is the trace of a kill
    between the two renames, not somebody's data, and does not count.

    Raises:
        ValueError: If `prefix` has a `.bin` or `.idx` and `overwrite` is not set.
    """
    idx, tokens = idx_path(prefix), bin_path(prefix)
    killed_half_way = idx.with_name(idx.name + ".partial").exists() and not idx.exists()
    for path in (idx, tokens):
        if path.exists() and not overwrite and not (path == tokens and killed_half_way):
            raise ValueError(f"{path} exists already. Pass --overwrite, or choose another output.")


def check_prefix(option: str, prefix: str) -> None:
    """Raises ValueError if `prefix` is empty, a folder, or has the ending of a file."""
    if not prefix:
        raise ValueError(f"{option} ('') must not be empty. Check for an unset variable.")
    if prefix.endswith((".bin", ".idx")):
        raise ValueError(f"{option} ({prefix}) must be the prefix alone. Use {prefix[:-4]}.")
    if os.path.basename(prefix) in ("", ".", ".."):
        raise ValueError(f"{option} ({prefix}) must end in a name, not in a folder. Add a name.")


def index_blocks(dtype: np.dtype[np.integer], lengths: npt.NDArray[np.int32]) -> Iterator[bytes]:
    """Yields the bytes of an index of one sequence per document, in blocks.

    Args:
        dtype: Of the tokens.
        lengths: Tokens of each document; 0 is a document without a sequence. May be memory mapped.
    """
    starts = range(0, len(lengths), BLOCK)
    blocks = (np.asarray(lengths[begin : begin + BLOCK]) for begin in starts)
    sequences = sum(int(np.count_nonzero(block)) for block in blocks)
    yield HEADER.pack(MAGIC, VERSION, CODES[dtype], sequences, len(lengths) + 1)
    for begin in starts:
        block = lengths[begin : begin + BLOCK]
        yield block[block > 0].astype("<i4").tobytes()
    offset = 0
    for begin in starts:
        block = lengths[begin : begin + BLOCK]
        ends = offset + np.cumsum(block[block > 0], dtype=np.int64)
        yield (np.concatenate(([offset], ends))[:-1] * dtype.itemsize).astype("<i8").tobytes()
        offset = int(ends[-1]) if ends.size else offset
    yield bytes(8)
    offset = 0
    for begin in starts:
        ends = offset + np.cumsum(lengths[begin : begin + BLOCK] > 0)
        yield ends.astype("<i8").tobytes()
        offset = int(ends[-1])


class IndexedFile:
    """A data set, checked and memory mapped.

    Opening checks the header, both sizes against each other, and every length, pointer and
    boundary.

    Args:
        prefix: Path without `.bin`.

    Attributes:
        dtype: dtype of the tokens.
        lengths: Tokens per sequence, int32. [n]
        boundaries: First sequence of each document, then n, int64. [d]
        tokens: Every token, memory mapped. [sum(lengths)]

    Raises:
        ValueError: If a file is missing, truncated, or not of this format.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self._idx, self._bin = idx_path(prefix), bin_path(prefix)
        for path, other in ((self._idx, self._bin), (self._bin, self._idx)):
            if not path.is_file():
                state = "exists" if other.is_file() else "is missing too"
                raise ValueError(f"{path} is missing ({other.name} {state}). {REMAKE}")
        sequences, boundaries = self._read_header()
        rows = np.memmap(self._idx, mode="r", dtype=np.uint8, offset=0)
        ends = HEADER.size + np.cumsum([4 * sequences, 8 * sequences, 8 * boundaries])
        self.lengths = rows[HEADER.size : ends[0]].view("<i4")
        self._pointers = rows[ends[0] : ends[1]].view("<i8")
        self.boundaries = rows[ends[1] : ends[2]].view("<i8")
        self._check_sequences()
        self._check_boundaries()
        empty: npt.NDArray = np.empty(0, dtype=self.dtype)
        has_tokens = self._bin.stat().st_size > 0
        self.tokens = np.memmap(self._bin, mode="r", dtype=self.dtype) if has_tokens else empty

    def _read_header(self) -> tuple[int, int]:
        size = self._idx.stat().st_size
        with self._idx.open("rb") as file:
            head = file.read(HEADER.size)
        if len(head) < HEADER.size:
            raise ValueError(f"{self._idx} is truncated: {size} bytes, no header. {REMAKE}")
        magic, version, code, sequences, boundaries = HEADER.unpack(head)
        if magic != MAGIC or version != VERSION:
            raise ValueError(
                f"{self._idx} is not a Megatron index of version {VERSION} (it starts with "
                f"{magic!r}, version {version}). {REMAKE}"
            )
        if code not in DTYPES:
            raise ValueError(f"{self._idx} has an unknown dtype code ({code}). {REMAKE}")
        self.dtype = np.dtype(DTYPES[code])
        needed = HEADER.size + 12 * sequences + 8 * boundaries
        if size == needed + sequences > needed:
            raise ValueError(
                f"{self._idx} has a mode for each sequence: it is the index of a multimodal data "
                "set, which holds more than text. Use a data set of text."
            )
        if size != needed:
            raise ValueError(
                f"{self._idx} is damaged: {size} bytes, but its {sequences} sequences and "
                f"{boundaries} document boundaries need {needed}. {REMAKE}"
            )
        return sequences, boundaries

    def _check_sequences(self) -> None:
        start, begin = 0, 0
        for lengths, said in zip(self.length_blocks(), self.pointer_blocks(), strict=True):
            ends = start + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            starts = np.concatenate(([start], ends[:-1]))
            wrong = (lengths < 0) | (starts != said)
            if wrong.any():
                row = int(wrong.argmax())
                raise ValueError(
                    f"{self._idx} is damaged: lengths and offsets disagree at sequence "
                    f"{begin + row}, of {lengths[row]} tokens, at byte {said[row]} and not "
                    f"{starts[row]} of {self._bin.name}. {REMAKE}"
                )
            start = int(ends[-1])
            begin += len(lengths)
        size = self._bin.stat().st_size
        if size != start:
            state = "truncated" if size < start else "not the file this index was made for"
            raise ValueError(
                f"{self._bin} is {state}: {size} bytes, but {self._idx.name} needs {start}. "
                f"{REMAKE}"
            )

    def _check_boundaries(self) -> None:
        bounds, last = self.boundaries, len(self.lengths)
        wrong = 0 if len(bounds) == 0 or bounds[0] != 0 else None
        before, begin = 0, 0
        for block in self.boundary_blocks():
            falling = np.diff(block, prepend=before) < 0
            if wrong is None and falling.any():
                wrong = begin + int(falling.argmax())
            before = int(block[-1])
            begin += len(block)
        if wrong is None and before != last:
            wrong = len(bounds) - 1
        if wrong is not None:
            value = bounds[wrong] if len(bounds) else "none"
            raise ValueError(
                f"{self._idx} is damaged: its document boundaries are wrong, from number {wrong} "
                f"({value}) on; they must rise from 0 to {last} sequences. {REMAKE}"
            )

    def _read_rows(self, offset: int, count: int, dtype: str) -> Iterator[npt.NDArray]:
        """Yields `count` rows in blocks, read and not mapped: the memory is one block."""
        with self._idx.open("rb") as file:
            file.seek(offset)
            for begin in range(0, count, BLOCK):
                wanted = min(BLOCK, count - begin)
                rows = np.fromfile(file, dtype=dtype, count=wanted)
                if len(rows) < wanted:
                    raise ValueError(f"{self._idx} became shorter while it was read. {REMAKE}")
                yield rows

    def length_blocks(self) -> Iterator[npt.NDArray]:
        """Yields `lengths` in blocks of at most BLOCK, int32."""
        return self._read_rows(HEADER.size, len(self.lengths), "<i4")

    def pointer_blocks(self) -> Iterator[npt.NDArray]:
        """Yields where each sequence starts, in bytes, in blocks of at most BLOCK, int64."""
        return self._read_rows(HEADER.size + 4 * len(self.lengths), len(self.lengths), "<i8")

    def boundary_blocks(self) -> Iterator[npt.NDArray]:
        """Yields `boundaries` in blocks of at most BLOCK, int64."""
        offset = HEADER.size + 12 * len(self.lengths)
        return self._read_rows(offset, len(self.boundaries), "<i8")

    def document_length_blocks(self) -> Iterator[npt.NDArray]:
        """Yields the tokens of each document, all its sequences together, in blocks, int64."""
        before = np.empty(0, dtype=np.int64)
        for bounds in self.boundary_blocks():
            starts = np.concatenate((before, self._token_offsets(bounds)))
            yield np.diff(starts)
            before = starts[-1:]

    def document(self, number: int) -> npt.NDArray:
        """Returns the tokens of document `number`, all its sequences together, a view of the file.

        Raises:
            ValueError: If there is no such document.
        """
        if not 0 <= number < self.documents:
            raise ValueError(
                f"document ({number}) must be in [0, {self.documents}), the documents of "
                f"{self.prefix}. Choose another."
            )
        begin, end = self._token_offsets(self.boundaries[number : number + 2])
        return self.tokens[begin:end]

    def _token_offsets(self, sequences: npt.NDArray) -> npt.NDArray:
        """Returns how many tokens come before each of `sequences`; one after the last is all."""
        offsets = np.full(len(sequences), self.tokens.size, dtype=np.int64)
        inside = sequences < len(self.lengths)
        offsets[inside] = self._pointers[sequences[inside]] // self.dtype.itemsize
        return offsets

    @property
    def documents(self) -> int:
        """Number of documents, empty ones included."""
        return len(self.boundaries) - 1

    def __len__(self) -> int:
        """Returns the number of sequences: what Megatron's GPTDataset splits and serves."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> npt.NDArray:
        """Returns the tokens of sequence `index`, a view of the file."""
        start = int(self._pointers[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[index])]
