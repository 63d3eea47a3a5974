"""Chunks to documents: the texts of each, or what is wrong with it."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_satformer.data.reading.chunks import Chunk, read_chunks
from megatron_satformer.data.reading.columns import Row, row_group_of
from megatron_satformer.data.reading.inputs import Source
from megatron_satformer.data.reading.kinds import BOM, COLUMNS

EXCERPT = 200
Parser = Callable[[bytes], list[str]]


@dataclass(frozen=True)
class Rejected:
    """A document that cannot be used.

    Attributes:
        offset: Its place in its chunk, from 0.
        reason: What is wrong with it.
        excerpt: Its beginning, for whoever looks into the rejects file.
    """

    offset: int
    reason: str
    excerpt: str


Reader = Callable[[Chunk], Iterator[list[str] | Rejected]]


def build_reader(keys: Sequence[str]) -> Reader:
    """Returns what yields the texts under `keys` of each document of a chunk, or Rejected."""
    formats: dict[str, Callable[[Any], list[str]]] = {
        "jsonl": build_line_parser(keys),
        "txt": lambda raw: [decode_text(raw)] * len(keys),
        **dict.fromkeys(COLUMNS, lambda row: parse_row(row, keys)),
    }

    def read(chunk: Chunk) -> Iterator[list[str] | Rejected]:
        parse, content = formats[chunk.source.format], chunk.content
        if isinstance(content, range):
            content = _read_range(chunk.source.path, content)
        for offset, raw in enumerate(content):
            try:
                yield parse(raw)
            except ValueError as error:
                begins = raw if isinstance(raw, bytes) else b" ".join(filter(None, raw))
                yield Rejected(offset, str(error), begins[:EXCERPT].decode("utf-8", "replace"))

    return read


def read_documents(
    sources: Sequence[Source], keys: Sequence[str], separator: str | None = None
) -> Iterator[list[str]]:
    """Yields the texts of every document of the inputs, in order, in this process.

    Raises:
        ValueError: For the first bad document, with its place.
    """
    read, seen = build_reader(keys), Counter[int]()
    for chunk in read_chunks(sources, keys, separator):
        for found in read(chunk):
            seen[chunk.index] += 1
            if isinstance(found, Rejected):
                raise ValueError(describe_bad(chunk.source, seen[chunk.index], found.reason))
            yield found


def describe_bad(source: Source, number: int, reason: str) -> str:
    """Returns the message about the bad document `number`, from 1, of an input."""
    return f"{place_of(source, number)}: {reason}. Correct or remove it."


def place_of(source: Source, number: int) -> str:
    """Returns what to call document `number`, from 1, of an input."""
    group = row_group_of(source, number)
    inside = f" (row group {group})" if group is not None else ""
    return f"{source.path}, {source.unit} {number}{inside}"


def _read_range(path: str, wanted: range) -> list[bytes]:
    with open(path, "rb") as file:
        if wanted.start:
            # A line that starts before the range belongs to the range before.
            file.seek(wanted.start - 1)
            file.readline()
        left = wanted.stop - file.tell()
        if left <= 0:
            return []
        block = file.read(left)
        # Splitting is several times faster than reading line by line.
        lines = (block if block.endswith(b"\n") else block + file.readline()).split(b"\n")
    if not wanted.start:
        lines[0] = lines[0].removeprefix(BOM)
    return lines if lines[-1] else lines[:-1]


def parse_line(line: bytes, keys: Sequence[str]) -> list[str]:
    """Returns the texts under `keys` of one JSON line.

    Raises:
        ValueError: If the line is not UTF-8, not a JSON object, or lacks a key with a string. The
            message says what is wrong, not where.
    """
    text = decode_text(line)
    if not text.strip():
        raise ValueError("the line is empty")
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("invalid JSON (nested too deep)") from None
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object, not {_json_name(record)}")
    texts = []
    for key in keys:
        if key not in record:
            found = ", ".join(sorted(record)) or "none"
            raise ValueError(f'no key "{key}" (its keys: {found}); see --json-keys')
        texts.append(check_text(record[key], key))
    return texts


def parse_row(row: Row, keys: Sequence[str]) -> list[str]:
    """Returns the texts of a row of columns.

    Raises:
        ValueError: If a value is missing or not UTF-8; the message names its column.
    """
    texts = []
    for value, key in zip(row, keys, strict=True):
        if value is None:
            raise ValueError(f'"{key}" must be a string, not null')
        try:
            texts.append(decode_text(value))
        except ValueError as error:
            raise ValueError(f'"{key}" has {error}') from None
    return texts


def decode_text(raw: bytes) -> str:
    """Returns the text of UTF-8 bytes.

    Raises:
        ValueError: If they are not UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 (byte {error.start + 1}: {error.reason})") from None


def check_text(value: object, key: str) -> str:
    """Returns `value` if it is text that UTF-8 can hold.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, str):
        raise ValueError(f'"{key}" must be a string, not {_json_name(value)}')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f'"{key}" has half a surrogate pair (character {error.start + 1})'
        ) from None
    return value


def build_line_parser(keys: Sequence[str]) -> Parser:
    """Returns `parse_line` for these keys, through msgspec where it is installed (twice as fast).

    What msgspec refuses goes to `parse_line`, which decides and explains: json takes a little more.
    """
    try:
        import msgspec
    except ImportError:
        return lambda line: parse_line(line, keys)
    names = [f"key{index}" for index in range(len(keys))]
    record = msgspec.defstruct(
        "Record",
        [(name, str) for name in names],
        rename=dict(zip(names, keys, strict=True)),
        gc=False,
    )
    decode = msgspec.json.Decoder(record).decode
    only = names[0] if len(names) == 1 else None

    def parse(line: bytes) -> list[str]:
        # msgspec does not look into the strings of other keys, which must be UTF-8 too.
        if not line.isascii():
            decode_text(line)
        try:
            found = decode(line)
        except (msgspec.DecodeError, RecursionError):
            return parse_line(line, keys)
        return [getattr(found, only)] if only else [getattr(found, name) for name in names]

    return parse


def _json_name(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")
