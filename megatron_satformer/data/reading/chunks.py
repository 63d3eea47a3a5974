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

from megatron_satformer.data.reading.documents import (
    Parser,
    build_line_parser,
    check_text,
    decode_text,
)
from megatron_satformer.data.reading.inputs import STDIN, Source

# Text in a chunk: large against the cost of a hand-over, small against memory and a slow tokenizer.
CHUNK_BYTES = 2 << 20


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents of one input.

    Attributes:
        source: Index of the input.
        path: Its name.
        kind: "range" (bytes `begin` to `end` of the file), "lines" (raw JSON lines), "txt" (raw
            documents) or "rows" (a list of texts for each document).
        begin: First byte; a line belongs to the range it starts in.
        end: Byte after the last.
        content: The documents, for all kinds but "range".
        file_bytes: Bytes of the file on disk that it used up (compressed, if it is).
    """

    source: int
    path: str
    kind: str
    file_bytes: int
    begin: int = 0
    end: int = 0
    content: Sequence[Any] = ()


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
    for index, source in enumerate(sources):
        if source.format == "parquet":
            yield from _parquet_chunks(index, source, keys, chunk_bytes)
        elif source.format == "jsonl" and source.compression is None and source.path != STDIN:
            for begin in range(0, source.size, chunk_bytes):
                end = min(begin + chunk_bytes, source.size)
                yield Chunk(index, source.path, "range", end - begin, begin, end)
        else:
            yield from _stream_chunks(index, source, separator, chunk_bytes)


def iterate_documents(
    chunk: Chunk, keys: Sequence[str], parse: Parser
) -> Iterator[tuple[list[str], None] | tuple[bytes, ValueError]]:
    """Yields (texts, None) for each document of a chunk, or (its bytes, what is wrong).

    Args:
        chunk: The chunk.
        keys: Keys of a document.
        parse: `build_line_parser(keys)`.
    """
    if chunk.kind == "rows":
        for row in chunk.content:
            try:
                yield [check_text(*pair) for pair in zip(row, keys, strict=True)], None
            except ValueError as error:
                yield repr(row).encode("utf-8", "replace"), error
        return
    read = (lambda raw: [decode_text(raw)] * len(keys)) if chunk.kind == "txt" else parse
    for raw in _read_range(chunk) if chunk.kind == "range" else chunk.content:
        try:
            yield read(raw), None
        except ValueError as error:
            yield raw, error


def read_documents(
    sources: Sequence[Source], keys: Sequence[str], separator: str | None = None
) -> Iterator[list[str]]:
    """Yields the texts of every document of the inputs, in order, in this process.

    Raises:
        ValueError: For the first bad document, with its place.
    """
    parse = build_line_parser(keys)
    source, number = -1, 0
    for chunk in read_chunks(sources, keys, separator):
        source, number = chunk.source, number if chunk.source == source else 0
        for content, error in iterate_documents(chunk, keys, parse):
            number += 1
            if error is not None:
                raise ValueError(describe_bad(sources[source], number, error))
            yield content  # type: ignore[misc]


def describe_bad(source: Source, number: int, reason: object) -> str:
    """Returns the message about the bad document `number`, from 1, of an input."""
    return f"{source.path}, {source.unit} {number}: {reason}. Correct or remove it."


def _read_range(chunk: Chunk) -> list[bytes]:
    with open(chunk.path, "rb") as file:
        if chunk.begin:
            # A line that starts before the range belongs to the range before.
            file.seek(chunk.begin - 1)
            file.readline()
        left = chunk.end - file.tell()
        if left <= 0:
            return []
        block = file.read(left)
        # Splitting is several times faster than reading line by line.
        lines = (block if block.endswith(b"\n") else block + file.readline()).split(b"\n")
    return lines if lines[-1] else lines[:-1]


def _stream_chunks(
    index: int, source: Source, separator: str | None, chunk_bytes: int
) -> Iterator[Chunk]:
    text = source.format == "txt"
    mark = (separator or "").encode("utf-8") if text else b"\n"
    kind = "txt" if text else "lines"
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
                yield Chunk(index, source.path, kind, now - position, content=documents)
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


def _parquet_chunks(
    index: int, source: Source, keys: Sequence[str], chunk_bytes: int
) -> Iterator[Chunk]:
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
                share = batch.num_rows * source.size // rows
                yield Chunk(
                    index, source.path, "rows", share, content=list(zip(*columns, strict=True))
                )
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
