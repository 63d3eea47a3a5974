"""Inputs to chunks of documents, streamed: the unit of work, of resuming and of every checksum.

How an input is cut depends on its bytes alone, never on workers or timing. A plain JSON lines file
is cut into byte ranges that the workers read themselves; everything else (compressed, Parquet,
Arrow, plain text, standard input) is read here, from beginning to end, and travels in the chunk.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_satformer.data.reading.columns import check_columns, cut_columns
from megatron_satformer.data.reading.inputs import STDIN, Source
from megatron_satformer.data.reading.kinds import BOM, UnknownKindError, refuse_other_text
from megatron_satformer.data.reading.pieces import Piece, can_be_cut, whole_pieces
from megatron_satformer.data.reading.separators import Separator
from megatron_satformer.data.reading.streams import Stream, compression_of

# Text in a chunk: large against the cost of a hand-over, small against memory and a slow tokenizer.
CHUNK_BYTES = 2 << 20


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents of one input.

    Attributes:
        number: Of the chunk in all the inputs, from 0.
        index: Of the input, from 0.
        source: The input.
        file_bytes: Bytes of the file on disk that it used up (compressed, if it is).
        content: Raw JSON lines or text documents, rows of raw texts (Parquet, Arrow), or which
            bytes of the file (a plain JSON lines file); a line belongs to the range it starts in.
    """

    number: int
    index: int
    source: Source
    file_bytes: int
    content: Sequence[Any]

    @property
    def text_bytes(self) -> int:
        """Bytes of the documents, uncompressed."""
        if isinstance(self.content, range):
            return len(self.content)
        if self.source.has_columns:
            return sum(len(text) for row in self.content for text in row if text)
        ends = len(self.content) if self.source.format == "jsonl" else 0
        return sum(map(len, self.content)) + ends


def read_chunks(
    sources: Sequence[Source],
    keys: Sequence[str],
    separator: str | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    pieces: Sequence[Piece] | None = None,
) -> Iterator[Chunk]:
    """Yields the chunks of all inputs, in order.

    Args:
        sources: The inputs.
        keys: Columns of a Parquet or Arrow file.
        separator: What stands between two documents of plain text, in LF or CRLF; "" makes a file
            one document. Files without it are told on stderr at the end.
        chunk_bytes: About how much text a chunk holds.
        pieces: What to read of the inputs; all if left out.

    Raises:
        ValueError: If an input is damaged, or lacks a column.
    """
    pieces = whole_pieces(sources) if pieces is None else pieces
    for piece in pieces:
        if piece.source.has_columns:
            check_columns(piece.source, keys)
    between, number = Separator(separator or ""), 0
    for piece in pieces:
        source = piece.source
        if source.has_columns:
            cut: _Cut = cut_columns(source, keys, chunk_bytes)
        elif can_be_cut(source):
            cut = _cut_ranges(piece, chunk_bytes)
        else:
            cut = _cut_stream(source, between, chunk_bytes)
        for file_bytes, content in cut:
            yield Chunk(number, piece.index, source, file_bytes, content)
            number += 1
    between.report()


# File bytes and content of each chunk of one input.
_Cut = Iterator[tuple[int, Sequence[Any]]]


def _cut_ranges(piece: Piece, chunk_bytes: int) -> _Cut:
    for begin in range(piece.begin, piece.end, chunk_bytes):
        content = range(begin, min(begin + chunk_bytes, piece.end))
        yield len(content), content


def _cut_stream(source: Source, separator: Separator, chunk_bytes: int) -> _Cut:
    if source.format == "jsonl":
        separator = Separator("\n")
    with (
        _StandardInput()
        if source.path == STDIN
        else Stream(source.path, source.compression) as file
    ):
        position, found = 0, False
        block = file.read(len(BOM) + chunk_bytes).removeprefix(BOM)
        pending, searched = bytearray(block), 0
        while block:
            documents = separator.cut(pending, searched)
            if documents is not None:
                found = True
                pending = bytearray(documents.pop())
            if documents:
                yield file.tell() - position, documents
                position = file.tell()
            searched = max(0, len(pending) - separator.longest + 1)
            block = file.read(chunk_bytes)
            pending += block
        separator.count(source.path, found)
        if pending:
            yield file.tell() - position, [bytes(pending)]


class _StandardInput:
    """Standard input as a Stream, whose kind nobody has looked at before."""

    def __init__(self) -> None:
        self._begun = False

    def read(self, size: int) -> bytes:
        block = sys.stdin.buffer.read(size)
        if not self._begun:
            self._begun = True
            packed = compression_of(block)
            if packed is not None:
                raise ValueError(f"input (-) is compressed ({packed}). Decompress it on the way.")
            try:
                refuse_other_text(block)
            except UnknownKindError as error:
                raise ValueError(f"input (-) is {error}.") from None
        return block

    def tell(self) -> int:
        return 0

    def __enter__(self) -> "_StandardInput":
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves it open."""
