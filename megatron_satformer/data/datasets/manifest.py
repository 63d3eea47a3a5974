"""What a data set held when it was written: sizes, counts and sha256, in `NAME.manifest.json`.

    {"format": "megatron-satformer dataset manifest", "version": 1,
     "datasets": {"corpus_text_document": {"documents": 3, "tokens": 10, "dtype": "uint16",
        "bin": {"bytes": 20, "sha256": "..."}, "idx": {"bytes": 99, "sha256": "..."}}}}

A merged `.bin` has, in place of one sha256, the bytes and sha256 of what it was made of, in order:

    "bin": {"bytes": 30, "parts": [{"bytes": 20, "sha256": "..."}, {"bytes": 10, "sha256": "..."}]}

One manifest may describe several data sets of its folder; whoever wrote it may add more keys.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_satformer.files.atomic import write_atomically

FORMAT = "megatron-satformer dataset manifest"
VERSION = 1
SUFFIX = ".manifest.json"
SHA256 = re.compile("[0-9a-f]{64}")


class Checksum(NamedTuple):
    """A file, or a part of one: its bytes, and their sha256 in hexadecimal."""

    bytes: int
    sha256: str


def manifest_path(output_prefix: str | os.PathLike[str]) -> Path:
    """Returns where the manifest of what was written to `output_prefix` lies."""
    return Path(f"{os.fspath(output_prefix)}{SUFFIX}")


def find_manifest(prefix: str | os.PathLike[str]) -> Path | None:
    """Returns the manifest that describes the data set `prefix`, or None.

    It is named like the data set, or like its beginning up to an underscore: preprocess_data names
    data sets PREFIX_KEY_document. The longest name wins.

    Raises:
        ValueError: If a manifest with such a name is damaged.
    """
    folder, name = os.path.split(os.fspath(prefix))
    ends = [len(name), *(match.start() for match in reversed(list(re.finditer("_", name))))]
    for end in ends:
        path = manifest_path(os.path.join(folder, name[:end]))
        if path.is_file() and name in read_manifest(path)["datasets"]:
            return path
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns a manifest, checked.

    Raises:
        ValueError: If it is not a manifest of this version, or damaged.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is damaged: {error}. Rename or remove it to go on without it."
        ) from None
    fault = _fault(content)
    if fault:
        raise ValueError(f"{path} is damaged: {fault}. Rename or remove it to go on without it.")
    return content


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """Writes a manifest, whole or not at all; its data sets are sorted by name."""
    fault = _fault(content)
    assert fault is None, fault
    ordered = {**content, "datasets": dict(sorted(content["datasets"].items()))}
    text = json.dumps(ordered, indent=2, ensure_ascii=False)
    write_atomically(path, f"{text}\n".encode())


def describe_dataset(
    documents: int, tokens: int, dtype: str, bin_parts: Sequence[Checksum], idx_file: Checksum
) -> dict[str, Any]:
    """Returns a data set's entry in "datasets".

    Args:
        documents: Documents, empty ones included.
        tokens: Tokens.
        dtype: Name of the dtype of the tokens, such as "uint16".
        bin_parts: Of `.bin`, in order; at least one.
        idx_file: Of `.idx`.
    """
    parts = [part._asdict() for part in bin_parts]
    whole = {"bytes": sum(part.bytes for part in bin_parts), "parts": parts}
    return {
        "documents": documents,
        "tokens": tokens,
        "dtype": dtype,
        "bin": parts[0] if len(parts) == 1 else whole,
        "idx": idx_file._asdict(),
    }


def bin_parts(entry: dict[str, Any]) -> list[Checksum]:
    """Returns the parts of `.bin` that an entry of "datasets" has checksums of, in order."""
    file = entry["bin"]
    return [Checksum(part["bytes"], part["sha256"]) for part in file.get("parts", [file])]


def record_dataset(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Writes the entry of one data set; what else the manifest at `path` holds stays."""
    content = read_manifest(path) if path.exists() else {}
    content = {"format": FORMAT, "version": VERSION, **content}
    content["datasets"] = {**content.get("datasets", {}), name: entry}
    write_manifest(path, content)


def forget_dataset(prefix: str | os.PathLike[str]) -> None:
    """Removes the data set `prefix` from every manifest: it is about to be replaced.

    A manifest that describes nothing else goes.

    Raises:
        ValueError: If such a manifest is damaged.
    """
    while (path := find_manifest(prefix)) is not None:
        content = read_manifest(path)
        del content["datasets"][os.path.basename(os.fspath(prefix))]
        if content["datasets"]:
            write_manifest(path, content)
        else:
            path.unlink()


def _fault(content: Any) -> str | None:
    """Returns what is wrong with a manifest, or None."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return f'it is not a "{FORMAT}"'
    if content.get("version") != VERSION:
        return f"its version is {content.get('version')!r}, not {VERSION}"
    datasets = content.get("datasets")
    if not isinstance(datasets, dict):
        return '"datasets" is missing'
    for name, entry in datasets.items():
        if not isinstance(entry, dict):
            return f"{name} is {entry!r}"
        for key in ("documents", "tokens"):
            if not _is_count(entry.get(key)):
                return f"{name}: {key} is {entry.get(key)!r}"
        if not isinstance(entry.get("dtype"), str):
            return f"{name}: dtype is {entry.get('dtype')!r}"
        for kind in ("bin", "idx"):
            file = entry.get(kind)
            if not isinstance(file, dict) or not _is_count(file.get("bytes")):
                return f"{name}: {kind} has no size"
            parts = file.get("parts", [file]) if kind == "bin" else [file]
            if not isinstance(parts, list) or not all(map(_is_checksum, parts)):
                return f"{name}: {kind} has no sha256"
            if sum(part["bytes"] for part in parts) != file["bytes"]:
                return f"{name}: the parts of {kind} are not its {file['bytes']} bytes"
    return None


def _is_checksum(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_count(value.get("bytes")):
        return False
    digest = value.get("sha256")
    return isinstance(digest, str) and SHA256.fullmatch(digest) is not None


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
