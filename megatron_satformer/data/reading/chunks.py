"""Inputs to chunks of documents, streamed: the unit of work, of resuming and of every checksum.

How an input is cut depends on its bytes alone, never on workers or timing. A plain JSON lines file
is cut into byte ranges that the workers read themselves; everything else (compressed, Parquet,
plain text, standard input) is read here, from beginning to end, and travels in the chunk.
"""

import gzip
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_satformer.data.reading.inputs import STDIN, Source

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
        content: Raw JSON lines or text documents, rows of texts (Parquet), or which bytes of the
            file (a plain JSON lines file); a line belongs to the range it starts in.
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
        if self.source.format == "parquet":
            return sum(len(text) for row in self.content for text in row if isinstance(text, str))
        ends = len(self.content) if self.source.format == "jsonl" else 0
        return sum(map(len, self.content)) + ends


def read_chunks(
    sources: Sequence[Source],
    keys: Sequence[str],
    separator: str | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[Chunk]:
    """Yields the chunks of all inputs, in order.

    Args:
        sources: The inputs.
        keys: Columns of a Parquet file.
        separator: What stands between two documents of plain text; "" makes a file one document.
        chunk_bytes: About how much text a chunk holds.

    Raises:
        ValueError: If an input is damaged, or lacks a column.
    """
    number = 0
    for index, source in enumerate(sources):
        if source.format == "parquet":
            cut = _cut_parquet(source, keys, chunk_bytes)
        elif source.format == "jsonl" and source.compression is None and source.path != STDIN:
            cut = _cut_ranges(source, chunk_bytes)
        else:
            cut = _cut_stream(source, separator, chunk_bytes)
        for file_bytes, content in cut:
            yield Chunk(number, index, source, file_bytes, content)
            number += 1


# File bytes and content of each chunk of one input.
_Cut = Iterator[tuple[int, Sequence[Any]]]


def _cut_ranges(source: Source, chunk_bytes: int) -> _Cut:
    for begin in range(0, source.size, chunk_bytes):
        content = range(begin, min(begin + chunk_bytes, source.size))
        yield len(content), content


def _cut_stream(source: Source, separator: str | None, chunk_bytes: int) -> _Cut:
    mark = (separator or "").encode("utf-8") if source.format == "txt" else b"\n"
    with ExitStack() as stack:
        raw, file = _open(stack, source)
        position, pending, block = 0, bytearray(), b" "
        while block:
            try:
                block = file.read(chunk_bytes)
            except (gzip.BadGzipFile, EOFError, zlib.error, OSError) as error:
                raise ValueError(
                    f"input ({source.path}) is damaged or cannot be read to its end: {error}. "
                    "Fetch it again."
                ) from None
            searched = max(0, len(pending) - len(mark) + 1)
            pending += block
            documents = []
            if mark and pending.find(mark, searched) >= 0:
                *documents, rest = bytes(pending).split(mark)
                pending = bytearray(rest)
            if not block and pending:
                documents.append(bytes(pending))
            if documents:
                now = raw.tell() if source.path != STDIN else 0
                yield now - position, documents
                position = now


class _Zstd:
    """Reads zstd frames; unlike zstandard's own reader, notices when the last one is cut short."""

    def __init__(self, raw: IO[bytes], zstandard: Any) -> None:
        self.raw = raw
        self.error = zstandard.ZstdError
        # --long=31 files are allowed.
        self.context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self.frame, self.rest = self.context.decompressobj(), b""

    def read(self, size: int) -> bytes:
        """Returns some bytes, about `size` or more; none at the end."""
        out: list[bytes] = []
        while sum(map(len, out)) < size:
            block = self.rest or self.raw.read(1 << 17)
            self.rest = b""
            if not block:
                if self.started and not self.frame.eof:
                    raise EOFError("the last zstd frame is cut short")
                break
            if self.frame.eof:
                self.frame = self.context.decompressobj()
            self.started = True
            try:
                out.append(self.frame.decompress(block))
            except self.error as error:
                raise EOFError(str(error)) from None
            self.rest = self.frame.unused_data if self.frame.eof else b""
        return b"".join(out)

    started = False


def _open(stack: ExitStack, source: Source) -> tuple[IO[bytes], Any]:
    if source.path == STDIN:
        return sys.stdin.buffer, sys.stdin.buffer
    raw: IO[bytes] = Path(source.path).open("rb")  # noqa: SIM115 - closed by the stack
    stack.callback(raw.close)
    if source.compression == "gzip":
        return raw, stack.enter_context(gzip.GzipFile(fileobj=raw))
    if source.compression == "zstd":
        return raw, _Zstd(raw, _import("zstandard", source))
    return raw, raw


def _import(name: str, source: Source) -> Any:
    try:
        return __import__(name, fromlist=["*"])
    except ImportError:
        raise ValueError(
            f"input ({source.path}) needs the package {name.partition('.')[0]}. Install it: "
            'pip install "megatron-satformer[data]".'
        ) from None


def _cut_parquet(source: Source, keys: Sequence[str], chunk_bytes: int) -> _Cut:
    parquet, arrow = _import("pyarrow.parquet", source), _import("pyarrow", source)
    try:
        with parquet.ParquetFile(source.path, memory_map=True) as file:
            names = file.schema_arrow.names
            for key in keys:
                if key not in names:
                    raise ValueError(
                        f"input ({source.path}) has no column {key} (it has {', '.join(names)}). "
                        "See --json-keys."
                    )
            rows = max(file.metadata.num_rows, 1)
            sizes = _column_bytes(file.metadata, keys)
            batch_rows = max(1, min(rows, chunk_bytes * rows // max(sum(sizes), 1)))
            done = 0
            for batch in file.iter_batches(batch_size=batch_rows, columns=list(keys)):
                columns = [batch.column(key).to_pylist() for key in keys]
                done += batch.num_rows
                yield batch.num_rows * source.size // rows, list(zip(*columns, strict=True))
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(
            f"input ({source.path}) is damaged or no Parquet file: {error}. Fetch it again."
        ) from None


def _column_bytes(metadata: Any, keys: Sequence[str]) -> list[int]:
    """Uncompressed bytes of the wanted columns of each row group."""
    return [
        column.total_uncompressed_size
        for group in range(metadata.num_row_groups)
        for position in range(metadata.num_columns)
        if (column := metadata.row_group(group).column(position)).path_in_schema in keys
    ]
