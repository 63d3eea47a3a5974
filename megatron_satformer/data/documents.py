"""Documents out of JSON lines files, streamed, with every bad line named by file and number."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# What travels to a worker at once: large against the cost of a hand-over, small against memory.
CHUNK_BYTES = 1 << 18
# Read as text these give nonsense, so they are refused by name.
NOT_YET = (".zst", ".parquet", ".bz2", ".xz", ".zip", ".tar", ".arrow", ".txt")


@dataclass(frozen=True)
class Chunk:
    """Consecutive lines of one file.

    Attributes:
        path: The file.
        first_line: Number of the first line, from 1.
        lines: The lines, undecoded, each with its line end.
        file_bytes: Bytes of the file on disk (compressed, if it is) that this chunk used up.
    """

    path: str
    first_line: int
    lines: list[bytes]
    file_bytes: int


def check_inputs(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Returns the input files in order.

    Raises:
        ValueError: If there is none, or one is missing, a folder, unreadable or of a format not
            read yet.
    """
    if not paths:
        raise ValueError("input must name at least one .jsonl or .jsonl.gz file.")
    files = [Path(path) for path in paths]
    for path in files:
        if not path.exists():
            raise ValueError(f"input ({path}) does not exist. Give .jsonl or .jsonl.gz files.")
        if path.is_dir():
            raise ValueError(f"input ({path}) is a folder. Name its files, as in {path}/*.jsonl.")
        if path.suffix in NOT_YET:
            raise ValueError(
                f"input ({path}) must be JSON lines, plain or .gz; {path.suffix} is not read yet. "
                'Convert it to one {"text": ...} object a line.'
            )
        if not os.access(path, os.R_OK):
            raise ValueError(f"input ({path}) cannot be read. Check its permissions.")
    return files


def read_chunks(paths: Sequence[Path], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Yields the lines of the files, in order, in chunks of about `chunk_bytes`.

    Raises:
        ValueError: If a compressed file is damaged.
    """
    for path in paths:
        with path.open("rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            number, position = 1, 0
            while True:
                try:
                    lines = file.readlines(chunk_bytes)
                except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                    raise ValueError(
                        f"input ({path}) is damaged after line {number - 1}: {error}. Fetch it "
                        "again."
                    ) from None
                if not lines:
                    break
                yield Chunk(str(path), number, lines, raw.tell() - position)
                number, position = number + len(lines), raw.tell()


def parse_line(line: bytes, keys: Sequence[str]) -> list[str]:
    """Returns the texts under `keys` of one JSON line.

    Raises:
        ValueError: If the line is not UTF-8, not a JSON object, or lacks a key with a string. The
            message says what is wrong, not where.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 (byte {error.start + 1}: {error.reason})") from None
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
        value = record[key]
        if not isinstance(value, str):
            raise ValueError(f'"{key}" must be a string, not {_json_name(value)}')
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f'"{key}" has half a surrogate pair (character {error.start + 1})'
            ) from None
        texts.append(value)
    return texts


def iterate_documents(chunk: Chunk, keys: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields (place, texts) for each line of a chunk; place is "FILE, line N".

    Raises:
        ValueError: For the first bad line, with its place.
    """
    for offset, line in enumerate(chunk.lines):
        place = f"{chunk.path}, line {chunk.first_line + offset}"
        try:
            texts = parse_line(line, keys)
        except ValueError as error:
            raise ValueError(f"{place}: {error}. Correct or remove the line.") from None
        yield place, texts


def _json_name(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")
