"""What `--input` names: files, globs, folders and standard input, as a checked list in order."""

import glob
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_satformer.data.reading.folders import Found, Unread, find_by_glob, find_in_folder
from megatron_satformer.data.reading.kinds import COLUMNS, Kind, UnknownKindError, kind_of

STDIN = "-"
ON_UNKNOWN = ("error", "skip")
WAY_OUT = (
    "Give .jsonl or .txt files (also compressed), .parquet or .arrow files, a glob, a folder, or "
    "- for stdin."
)
# Named in a message.
_MOST = 5


@dataclass(frozen=True)
class Source:
    """One input file.

    Attributes:
        path: As the user named it (or found in what they named); `-` is standard input.
        format: "jsonl", "txt", "parquet" or "arrow".
        compression: "gzip", "bz2", "xz", "zstd", "lz4", "brotli" or None.
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
        return "row" if self.has_columns else {"jsonl": "line", "txt": "document"}[self.format]

    @property
    def has_columns(self) -> bool:
        """Whether its documents are rows of columns."""
        return self.format in COLUMNS


@dataclass(frozen=True)
class Inputs:
    """What is read, and what was found and is not.

    Attributes:
        sources: In order.
        unread: Files that may be data and are skipped, or are other names of some that are read.
    """

    sources: list[Source]
    unread: list[Unread]


def find_inputs(
    values: Sequence[str | os.PathLike[str]],
    separator: str | None = None,
    on_unknown: str = "error",
) -> Inputs:
    """Returns the files that `--input` means: in the order given, sorted in a glob or folder.

    What was found and is not read is said on stderr.

    Args:
        values: Files, globs, folders (searched through at any depth), or `-` alone.
        separator: What `--document-separator` says; .txt files need it.
        on_unknown: "error" refuses a folder or glob with a file that is not read, "skip" goes on.

    Raises:
        ValueError: If nothing is found, a file is missing, unreadable, of an unknown kind or named
            twice, or a .txt file comes without a separator.
    """
    if on_unknown not in ON_UNKNOWN:
        raise ValueError(f"on_unknown ({on_unknown}) must be one of {', '.join(ON_UNKNOWN)}.")
    sources: list[Source] = []
    unread: list[Unread] = []
    for value in values:
        name = os.fspath(value)
        if name == STDIN:
            sources.append(_stdin(separator))
            continue
        found = _expand(name, separator)
        _report(name, found, on_unknown)
        sources += [_source(path, kind) for path, kind in found.files]
        unread += found.unread
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
    return Inputs(sources, unread)


def _expand(value: str, separator: str | None) -> Found:
    path = Path(value)
    if path.is_dir():
        found = find_in_folder(value)
        if not found.files and not any(one.unknown for one in found.unread):
            raise ValueError(f"input ({value}) is a folder without a file to read. {WAY_OUT}")
        return found
    if path.exists():
        return Found([(value, _named_kind(path, separator))])
    if glob.has_magic(value):
        found = find_by_glob(value)
        if not (found.files or found.unread or found.metadata):
            raise ValueError(f"input ({value}) matches no file. {WAY_OUT}")
        return found
    raise ValueError(f"input ({value}) does not exist. {WAY_OUT}")


def _named_kind(path: Path, separator: str | None) -> Kind:
    """The kind of a file that the user has named, which no option lets pass."""
    if not path.is_file():
        raise ValueError(f"input ({path}) must be a regular file. Pipe it, with --input -.")
    if not os.access(path, os.R_OK):
        raise ValueError(f"input ({path}) cannot be read. Check its permissions.")
    try:
        return kind_of(path, text_by_any_name=separator is not None)
    except UnknownKindError as error:
        raise ValueError(f"input ({path}) is of a kind that is not read: {error}.") from None


def _report(value: str, found: Found, on_unknown: str) -> None:
    """Says what is not read, a line each; or refuses what may be data.

    Raises:
        ValueError: For files of an unknown kind, unless they may be skipped.
    """
    unknown = [one for one in found.unread if one.unknown]
    if unknown and on_unknown == "error":
        shown = "; ".join(f"{one.path} ({one.reason})" for one in unknown[:_MOST])
        more = f"; and {len(unknown) - _MOST} more" if len(unknown) > _MOST else ""
        raise ValueError(
            f"input ({value}) holds {len(unknown)} that would not be read: {shown}{more}. Move "
            "or convert them, or pass --on-unknown skip to leave them out."
        )
    for one in found.unread:
        print(f"note: {one.path} is not read: {one.reason}.", file=sys.stderr)
    if found.metadata:
        names = ", ".join(found.metadata[:_MOST])
        more = f" and {len(found.metadata) - _MOST} more" if len(found.metadata) > _MOST else ""
        print(
            f"note: {len(found.metadata)} beside the data are not read, being metadata, hidden or "
            f"empty: {names}{more}.",
            file=sys.stderr,
        )


def _source(name: str, kind: Kind) -> Source:
    status = os.stat(name)
    return Source(name, *kind, status.st_size, status.st_mtime_ns)


def _stdin(separator: str | None) -> Source:
    # With a separator it is text, as a .txt file would be; without, JSON lines.
    return Source(STDIN, "jsonl" if separator is None else "txt", None, 0, 0)
