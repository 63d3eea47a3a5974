"""What `--input` names: files, globs, folders and standard input, as a checked list in order."""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STDIN = "-"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".txt": "txt"}
# Read as lines these would give nonsense, so they are refused by name.
NOT_TEXT = (".bz2", ".xz", ".zip", ".tar", ".tgz", ".7z", ".arrow", ".bin", ".idx", ".npy")
# What preprocess_data itself writes beside its output.
OURS = (".manifest.json", ".rejects.jsonl")
WAY_OUT = (
    "Give .jsonl, .txt (also .gz or .zst) or .parquet files, a glob, a folder, or - for stdin."
)


@dataclass(frozen=True)
class Source:
    """One input file.

    Attributes:
        path: As the user named it (or found in what they named); `-` is standard input.
        format: "jsonl", "txt" or "parquet".
        compression: "gzip", "zstd" or None.
        size: Bytes on disk; 0 for standard input.
        mtime_ns: Time of the last change, in nanoseconds; 0 for standard input.
    """

    path: str
    format: str
    compression: str | None
    size: int
    mtime_ns: int

    @property
    def unit(self) -> str:
        """What a document of this file is counted in, for messages."""
        return {"jsonl": "line", "txt": "document", "parquet": "row"}[self.format]


def find_inputs(
    values: Sequence[str | os.PathLike[str]], separator: str | None = None
) -> list[Source]:
    """Returns the files that `--input` means: in the order given, sorted in a glob or folder.

    Args:
        values: Files, globs, folders (their files of a known kind, at any depth), or `-` alone.
        separator: What `--document-separator` says; .txt files need it.

    Raises:
        ValueError: If nothing is found, a file is missing, unreadable, of an unknown kind or named
            twice, or a .txt file comes without a separator.
    """
    sources: list[Source] = []
    for value in values:
        name = os.fspath(value)
        sources += [_stdin(separator)] if name == STDIN else map(_source, _expand(name))
    if not sources:
        raise ValueError(f"input ({' '.join(map(str, values))}) names no file. {WAY_OUT}")
    if len(sources) > 1 and any(source.path == STDIN for source in sources):
        raise ValueError("input (-) must be the only one. Leave the files out, or pipe them too.")
    seen: set[str] = set()
    for source in sources:
        real = os.path.realpath(source.path)
        if real in seen:
            raise ValueError(
                f"input ({source.path}) is named twice, and would be in the data twice. Name it "
                "once; weights of a --data-path blend are the way to see data more often."
            )
        seen.add(real)
        if source.format == "txt" and separator is None:
            raise ValueError(
                f"input ({source.path}) is plain text: say what stands between two documents with "
                r"--document-separator, such as '\n\n' or '<|endoftext|>'; '' makes each file one."
            )
    return sources


def _expand(value: str) -> list[str]:
    path = Path(value)
    if path.is_dir():
        names = sorted(
            str(file)
            for file in path.rglob("*")
            if file.is_file() and _kind(file)[0] and not _is_ours_or_hidden(file.relative_to(path))
        )
        if not names:
            raise ValueError(f"input ({value}) is a folder without a file to read. {WAY_OUT}")
        return names
    if path.exists():
        return [value]
    if glob.has_magic(value):
        names = sorted(name for name in glob.glob(value, recursive=True) if os.path.isfile(name))
        if names:
            return names
        raise ValueError(f"input ({value}) matches no file. {WAY_OUT}")
    raise ValueError(f"input ({value}) does not exist. {WAY_OUT}")


def _is_ours_or_hidden(path: Path) -> bool:
    """Whether a file found in a folder is no corpus: what a run wrote there, or a hidden file."""
    hidden = any(part.startswith(".") or part.endswith(".partial") for part in path.parts)
    return hidden or path.name.endswith(OURS)


def _kind(path: Path) -> tuple[str | None, str | None]:
    compression = COMPRESSIONS.get(path.suffix)
    suffix = path.with_suffix("").suffix if compression else path.suffix
    if suffix == ".parquet":
        return (None if compression else "parquet"), compression
    return FORMATS.get(suffix, "jsonl" if compression and not suffix else None), compression


def _source(name: str) -> Source:
    path = Path(name)
    file_format, compression = _kind(path)
    if file_format is None:
        if any(suffix in NOT_TEXT or suffix == ".parquet" for suffix in path.suffixes):
            raise ValueError(f"input ({name}) is of a kind that is not read. {WAY_OUT}")
        # Whatever else its name: JSON lines, as Megatron-LM's tool takes it.
        file_format = "jsonl"
    if not os.access(path, os.R_OK):
        raise ValueError(f"input ({name}) cannot be read. Check its permissions.")
    status = path.stat()
    return Source(name, file_format, compression, status.st_size, status.st_mtime_ns)


def _stdin(separator: str | None) -> Source:
    # With a separator it is text, as a .txt file would be; without, JSON lines.
    return Source(STDIN, "jsonl" if separator is None else "txt", None, 0, 0)
