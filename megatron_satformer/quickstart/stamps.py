"""What is done and still as it was: one stamp per finished step.

A stamp holds the key of its step (what it was made from: its options, and the stamp before) and
the sha256 of every file it made. Must not know: what the steps do.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_satformer.files.atomic import write_atomically

Digests = dict[str, dict[str, Any]]  # path inside the folder -> size in bytes, sha256


@dataclass(frozen=True)
class Stamp:
    """A finished step.

    Attributes:
        key: Digest of what the step was made from.
        outputs: Every file that it made.
        seconds: Time that it took, over all attempts.
        says: Its result in one line.
        facts: Numbers for later steps and the summary.
    """

    key: str
    outputs: Digests
    seconds: float
    says: str
    facts: dict[str, Any]

    @property
    def identity(self) -> str:
        """Digest of what was made, and from what."""
        return digest([self.key, self.outputs])


def digest(value: Any) -> str:
    """Returns the sha256 of a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def make_key(name: str, options: dict[str, Any], before: Stamp | None) -> str:
    """Returns the key of a step: its name, its options, and what came before."""
    return digest([name, options, None if before is None else before.identity])


def list_files(root: Path, outputs: Iterable[str]) -> list[Path]:
    """Returns the files of the outputs (files or folders inside `root`), sorted."""
    files: list[Path] = []
    for output in outputs:
        path = root / output
        inside = path.rglob("*") if path.is_dir() else [path]
        files += [file for file in inside if file.is_file()]
    return sorted(files)


def digest_files(root: Path, outputs: Iterable[str]) -> Digests:
    """Returns size and sha256 of every file of the outputs."""
    return {
        file.relative_to(root).as_posix(): {"size": file.stat().st_size, "sha256": _sha256(file)}
        for file in list_files(root, outputs)
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


class Stamps:
    """The stamps of a run.

    Args:
        root: The run's folder, which the outputs lie in.
        folder: Where the stamps are kept.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.root = root
        self.folder = folder

    def read(self, name: str) -> Stamp | None:
        """Returns the stamp of a step, or None if there is none that can be read."""
        try:
            return Stamp(**json.loads(self._path(name).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, name: str, stamp: Stamp) -> None:
        """Writes the stamp of a step, whole or not at all."""
        write_atomically(self._path(name), json.dumps(asdict(stamp), indent=1).encode())

    def remove(self, names: Iterable[str]) -> None:
        """Removes the stamps of these steps."""
        for name in names:
            self._path(name).unlink(missing_ok=True)

    def damage(self, stamp: Stamp) -> dict[str, str]:
        """Returns the outputs that are not as they were made, each with what is wrong."""
        wrong = {}
        for name, was in stamp.outputs.items():
            file = self.root / name
            if not file.is_file():
                wrong[name] = "is missing"
            elif file.stat().st_size != was["size"]:
                wrong[name] = f"has {file.stat().st_size} bytes instead of {was['size']}"
            elif _sha256(file) != was["sha256"]:
                wrong[name] = "was changed"
        return wrong

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
