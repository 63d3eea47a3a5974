"""What a folder, or a glob, gives to read, and what it holds besides."""

import glob
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from megatron_satformer.data.reading.hub_folders import check_splits, dataset_files
from megatron_satformer.data.reading.kinds import COLUMNS, FORMATS, Kind, UnknownKindError, kind_of

# Beside data, these describe them. The last three are what Spark and Dask write.
METADATA = re.compile(
    r"(readme|license|licence|notice|citation)(\.(md|txt|rst|html|cff))?"
    r"|(dataset_infos?|dataset_dict|state|config)\.json|cache-\w+\.arrow"
    r"|_success|_metadata|_common_metadata",
    re.IGNORECASE,
)
# What preprocess_data itself writes beside its output.
OURS = (".manifest.json", ".rejects.jsonl")


@dataclass(frozen=True)
class Unread:
    """A file that was found and is not read, and why.

    Attributes:
        path: Of the file.
        reason: As a part of a sentence.
        unknown: Whether it may be data; else it is known to be none, or read already.
    """

    path: str
    reason: str
    unknown: bool


@dataclass
class Found:
    """What was found.

    Attributes:
        files: To read, in order, with their kinds.
        unread: Files that may be data, or are other names of some that are read.
        metadata: What is known to be no data.
    """

    files: list[tuple[str, Kind]] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)


def find_in_folder(name: str) -> Found:
    """Returns what a folder gives, sorted by path, each file once whatever links lead to it.

    Raises:
        ValueError: If it holds several splits of a dataset, or a file is damaged.
    """
    walk = _Walk()
    walk.visit(Path(name))
    found = walk.finish()
    columns = [Path(file) for file, kind in found.files if kind.format in COLUMNS]
    check_splits(Path(name), columns)
    return found


def find_by_glob(pattern: str) -> Found:
    """Returns what a glob gives, sorted by path; a folder that it matches is searched through."""
    walk = _Walk()
    matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    parents = {match.parent for match in matches}
    named = next(n for n, part in enumerate(Path(pattern).parts) if glob.has_magic(part))
    for match in matches:
        if any(_is_hidden(Path(part)) for part in match.parts[named:-1]):
            continue
        if not match.is_dir() or _is_hidden(match):
            walk.take(match)
        elif "**" not in pattern or match not in parents:
            walk.visit(match)
    return walk.finish()


class _Walk:
    """Files on the way through folders; links are followed, to each file and folder once."""

    def __init__(self) -> None:
        self.found = Found()
        self._placed: list[tuple[str, int, str, Kind]] = []
        self._seen: dict[str, str] = {}

    def visit(self, folder: Path) -> None:
        if self._is_seen(folder):
            return
        declared = dataset_files(folder)
        if declared is not None:
            self._take_declared(folder, declared)
            return
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not _is_hidden(path):
                self.visit(path)
            else:
                self.take(path)

    def _take_declared(self, folder: Path, files: list[Path]) -> None:
        """Adds what a dataset names as its data; what else its folder holds is not."""
        for place, file in enumerate(files):
            self.take(file, f"{folder}/", place)
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if any(map(_is_hidden, inside.parents)) or path in files:
                continue
            if _is_metadata(path):
                self.found.metadata.append(str(path))
            elif not path.is_dir():
                self._skip(path, f"the dataset in {folder} does not name it as its data")

    def take(self, path: Path, key: str | None = None, place: int = 0) -> None:
        """Adds a file; `key` and `place` say where in the order, in place of its path."""
        if key is None and _is_metadata(path):
            self.found.metadata.append(str(path))
            return
        if not path.exists():
            self._skip(path, "a link to nothing")
            return
        if not path.is_file():
            self._skip(path, "no regular file")
            return
        if self._is_seen(path):
            return
        if not os.access(path, os.R_OK):
            raise ValueError(f"input ({path}) cannot be read. Check its permissions.")
        try:
            kind = kind_of(path)
        except UnknownKindError as error:
            self._skip(path, str(error))
            return
        self._placed.append((key or str(path), place, str(path), kind))

    def finish(self) -> Found:
        self.found.files = [(path, kind) for _, _, path, kind in sorted(self._placed)]
        return self.found

    def _is_seen(self, path: Path) -> bool:
        real = os.path.realpath(path)
        first = self._seen.setdefault(real, str(path))
        if first != str(path):
            self.found.unread.append(
                Unread(str(path), f"the same as {first}, which is read", False)
            )
        return first != str(path)

    def _skip(self, path: Path, reason: str) -> None:
        self.found.unread.append(Unread(str(path), reason, True))


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name.endswith(".partial") or path.name == "_delta_log"


def _is_metadata(path: Path) -> bool:
    """Whether a file found in a folder is no corpus, by its name or by what lies beside it."""
    if _is_hidden(path) or METADATA.fullmatch(path.name) or path.name.endswith(OURS):
        return True
    if path.suffix in (".bin", ".idx"):
        return all(path.with_suffix(suffix).exists() for suffix in (".bin", ".idx"))
    return path.suffix.lower() not in FORMATS and path.is_file() and not path.stat().st_size
