"""Rows of Parquet and Arrow files as bytes of UTF-8, in pieces of bounded memory.

Rows are not decoded here: whoever parses them finds out which one is no UTF-8.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import Any

from megatron_satformer.data.reading.inputs import Source
from megatron_satformer.data.reading.streams import import_or_explain

TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
# Rows taken at once, however short their column is on disk: one text repeated in every row is
# stored once, and unfolds when it is read.
MOST_ROWS = 1024
# What an Arrow stream ends with.
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

# The values of each key of one row.
Row = tuple[bytes | None, ...]


def check_columns(source: Source, keys: Sequence[str]) -> None:
    """Refuses a file without text under every key, before a row is read.

    Raises:
        ValueError: Naming the column, its type and where it begins, or that the file is damaged.
    """
    with _explained(source):
        if source.format == "parquet":
            with import_or_explain("pyarrow.parquet", source.path).ParquetFile(
                source.path, memory_map=True
            ) as file:
                schema = file.schema_arrow
        else:
            with _map(source) as mapped:
                schema = _open_arrow(mapped, source).schema
    for key in keys:
        places = schema.get_all_field_indices(key)
        if len(places) != 1:
            has = f"{len(places)} columns" if places else "no column"
            raise ValueError(
                f"input ({source.path}) has {has} {key} (it has {', '.join(schema.names)}). "
                "See --json-keys."
            )
        kind = schema.field(places[0]).type
        if _value_type(kind) not in TEXT_TYPES:
            group = "row group 1, " if source.format == "parquet" else ""
            texts = [field.name for field in schema if _value_type(field.type) in TEXT_TYPES]
            raise ValueError(
                f"input ({source.path}) must have text in column {key}; it is {kind} throughout, "
                f"from {group}row 1. See --json-keys; columns of text: "
                f"{', '.join(texts) or 'none'}."
            )


def cut_columns(
    source: Source, keys: Sequence[str], chunk_bytes: int
) -> Iterator[tuple[int, list[Row]]]:
    """Yields the rows in pieces of about so much text, and the bytes of the file they take.

    Raises:
        ValueError: If the file is damaged.
    """
    batches = _parquet_batches if source.format == "parquet" else _arrow_batches
    rows: list[Row] = []
    text = used = 0
    with _explained(source):
        for file_bytes, batch in batches(source, keys, chunk_bytes):
            columns = [_as_bytes(batch.column(key)) for key in keys]
            rows += zip(*columns, strict=True)
            used += file_bytes
            text += sum(sum(map(len, filter(None, column))) for column in columns)
            if 2 * text >= chunk_bytes:
                yield used, rows
                rows, text, used = [], 0, 0
    if rows:
        yield used, rows


def row_group_of(source: Source, row: int) -> int | None:
    """Returns which row group of a Parquet file, from 1, a row is in; None for other files.

    Args:
        source: The file.
        row: From 1.
    """
    if source.format != "parquet":
        return None
    return bisect_left(_group_ends(source.path), row) + 1


@lru_cache(maxsize=8)
def _group_ends(path: str) -> list[int]:
    metadata = import_or_explain("pyarrow.parquet", path).read_metadata(path)
    return list(accumulate(metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)))


@contextmanager
def _explained(source: Source) -> Iterator[None]:
    arrow = import_or_explain("pyarrow", source.path)
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        name = "Parquet" if source.format == "parquet" else "Arrow"
        raise ValueError(
            f"input ({source.path}) is damaged or no {name} file: {error}. Fetch it again."
        ) from None


def _value_type(kind: Any) -> str:
    return str(kind.value_type if str(kind).startswith("dictionary") else kind)


def _as_bytes(array: Any) -> list[bytes | None]:
    if str(array.type).startswith("dictionary"):
        array = array.dictionary_decode()
    # Nothing is copied or looked at: the two differ in what they promise of the bytes.
    target = str(array.type).replace("string", "binary")
    return list(array.cast(target).to_pylist())


_Batches = Iterator[tuple[int, Any]]


def _parquet_batches(source: Source, keys: Sequence[str], chunk_bytes: int) -> _Batches:
    parquet = import_or_explain("pyarrow.parquet", source.path)
    with parquet.ParquetFile(source.path, memory_map=True) as file:
        rows = max(file.metadata.num_rows, 1)
        step = _step(rows, _column_bytes(file.metadata, keys), chunk_bytes)
        for batch in file.iter_batches(batch_size=step, columns=list(keys)):
            yield batch.num_rows * source.size // rows, batch


def _column_bytes(metadata: Any, keys: Sequence[str]) -> int:
    """Uncompressed bytes of the wanted columns."""
    return sum(
        column.total_uncompressed_size
        for group in range(metadata.num_row_groups)
        for position in range(metadata.num_columns)
        if (column := metadata.row_group(group).column(position)).path_in_schema in keys
    )


def _arrow_batches(source: Source, keys: Sequence[str], chunk_bytes: int) -> _Batches:
    with _map(source) as mapped:
        reader = _open_arrow(mapped, source)
        streamed = not hasattr(reader, "num_record_batches")
        count = 0 if streamed else reader.num_record_batches
        numbered = enumerate(reader if streamed else map(reader.get_batch, range(count)), start=1)
        done = 0
        for number, batch in numbered:
            end = mapped.tell() if streamed else source.size * number // count
            whole, done = end - done, end
            size = sum(batch.column(key).nbytes for key in keys)
            step = _step(batch.num_rows, size, chunk_bytes)
            for start in range(0, batch.num_rows, step):
                part = batch.slice(start, step)
                yield whole * part.num_rows // batch.num_rows, part
        if streamed:
            _check_end(source, mapped)


def _check_end(source: Source, mapped: Any) -> None:
    mapped.seek(max(0, source.size - len(_END_OF_STREAM)))
    if mapped.read() != _END_OF_STREAM:
        raise ValueError(
            f"input ({source.path}) is damaged or cannot be read to its end: it has no end mark. "
            "Fetch it again."
        )


def _step(rows: int, size: int, chunk_bytes: int) -> int:
    return max(1, min(rows, chunk_bytes * rows // max(size, 1), MOST_ROWS))


def _map(source: Source) -> Any:
    return import_or_explain("pyarrow", source.path).memory_map(source.path)


def _open_arrow(mapped: Any, source: Source) -> Any:
    """A reader of either of Arrow's two formats; datasets saves streams."""
    ipc = import_or_explain("pyarrow.ipc", source.path)
    beginning = mapped.read(6)
    mapped.seek(0)
    return ipc.open_file(mapped) if beginning == b"ARROW1" else ipc.open_stream(mapped)
