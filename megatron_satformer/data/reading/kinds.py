"""What kind of file an input is: by its name, and by its first bytes where the name does not say.

Must not know: folders, documents.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from megatron_satformer.data.reading.streams import Stream, compression_of

# By suffix, in whatever case.
COMPRESSIONS = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".bz2": "bz2",
    ".xz": "xz",
    ".lzma": "xz",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".lz4": "lz4",
    ".br": "brotli",
}
FORMATS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "txt",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COLUMNS = ("parquet", "arrow")
BOM = b"\xef\xbb\xbf"
# Bytes of text that a file is judged by, and enough where its name has told the most.
_HEAD, _GLANCE = 1 << 16, 1 << 10
_BEGINNINGS = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
_ARCHIVES = {b"PK\x03\x04": "zip", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}
_TAR, _TAR_PLACE = b"ustar", 257
_ARRAY = re.compile(rb"\[\s*([\[{\"\d-]|$)")
_WIDE = {b"\xff\xfe\0\0": 32, b"\0\0\xfe\xff": 32, b"\xff\xfe": 16, b"\xfe\xff": 16}


class UnknownKindError(ValueError):
    """A file of a kind that is not read; the message says what it is, and the way out."""


class Kind(NamedTuple):
    """Format ("jsonl", "txt", "parquet" or "arrow") and compression, or None, of a file."""

    format: str
    compression: str | None


def kind_of(path: Path, text_by_any_name: bool = False) -> Kind:
    """Returns what kind of file it is.

    Args:
        path: Of a file that can be read.
        text_by_any_name: Whether plain text needs no .txt.

    Raises:
        UnknownKindError: If it is of no kind that is read.
        ValueError: If it is compressed and damaged, or a package that reads it is missing.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    inner = suffixes[-2:-1] if compression else suffixes[-1:]
    named = FORMATS.get(inner[0]) if inner else None
    if named in COLUMNS:
        if compression is not None:
            raise UnknownKindError(f"{named} in {compression}: decompress it")
        return Kind(str(named), None)
    if compression is None:
        with path.open("rb") as file:
            compression = compression_of(file.read(8))
    may_be_whole = not named or inner == [".json"]
    with Stream(str(path), compression) as stream:
        head = stream.read(_HEAD if may_be_whole else _GLANCE)[:_HEAD]
    found = named or _format_by_content(head, compression, text_by_any_name)
    if found == "jsonl" or found == "txt":
        refuse_other_text(head)
    if found == "jsonl" and may_be_whole:
        _refuse_whole_document(head.removeprefix(BOM).lstrip(), path)
    return Kind(found, compression)


def refuse_other_text(head: bytes) -> None:
    """Refuses text that is not UTF-8 but one of its wide relatives.

    Args:
        head: How the text begins.

    Raises:
        UnknownKindError: If it is UTF-16 or UTF-32.
    """
    bits = next((bits for mark, bits in _WIDE.items() if head.startswith(mark)), None)
    # Without a mark: of mostly Latin letters every other byte is 0.
    even, odd = (2 * head[start::2].count(0) > len(head) // 2 for start in (0, 1))
    if bits is None and len(head) >= 4 and even != odd:
        bits = 16
    if bits is not None:
        raise UnknownKindError(f"UTF-{bits} text: convert it with iconv -f UTF-{bits} -t UTF-8")


def _format_by_content(head: bytes, compression: str | None, text_by_any_name: bool) -> str:
    if compression is None:
        found = next((name for mark, name in _BEGINNINGS.items() if head.startswith(mark)), None)
        if found is not None:
            return found
    archive = next((name for mark, name in _ARCHIVES.items() if head.startswith(mark)), None)
    if head[_TAR_PLACE : _TAR_PLACE + len(_TAR)] == _TAR:
        archive = "tar"
    if archive is not None:
        raise UnknownKindError(f"a {archive} archive: unpack it and name the folder")
    refuse_other_text(head)
    text = head.removeprefix(BOM).lstrip()
    if not text or _is_json(text):
        return "jsonl"
    if not _is_text(text):
        raise UnknownKindError("no text")
    if text_by_any_name:
        return "txt"
    raise UnknownKindError(
        "plain text, if text at all, by a name that does not end in .txt or .jsonl: rename it"
    )


def _is_json(text: bytes) -> bool:
    """Whether text begins with a JSON object or array."""
    line, ends, _ = text.partition(b"\n")
    if ends or len(text) < _HEAD // 2:
        try:
            return isinstance(json.loads(line), dict | list)
        except (ValueError, RecursionError):
            return _whole_document(text) is not None
    return text[:1] == b"{" and text[1:].lstrip()[:1] == b'"'


def _is_text(text: bytes) -> bool:
    try:
        # The last character may be cut.
        text[:-3].decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(text) - 8
    return b"\0" not in text


def _whole_document(text: bytes) -> str | None:
    """Returns what a file is that is JSON as a whole, not line by line; None if it is not."""
    line = text.partition(b"\n")[0].strip()
    if _ARRAY.match(line):
        return "one JSON array"
    broken_off = line == b"{" or (line.endswith((b",", b"{", b"[")) and not line.endswith(b"},"))
    return "one JSON object over several lines" if line[:1] == b"{" and broken_off else None


def _refuse_whole_document(text: bytes, path: Path) -> None:
    what = _whole_document(text)
    if what is not None:
        of_it = ".[]" if "array" in what else "."
        raise UnknownKindError(
            f"{what}, not a JSON object per line: convert it with "
            f"jq -c '{of_it}' {path.name} > {path.stem}.jsonl"
        )
