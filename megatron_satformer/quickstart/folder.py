"""The output folder: whose it is, who works in it, and what may be removed from it."""

import fcntl
import os
import shutil
from pathlib import Path

from megatron_satformer.quickstart.process import end_processes

MARK = ".quickstart"  # holds the lock and the stamps; a folder with it was made by us
KNOWN = (
    *("corpus", "tokenizer", "data", "checkpoints", "tensorboard", "hf", "logs"),
    *("gates.json", "loss.png", "gates.png", "samples.txt", "train.log", "summary.json"),
)


class RunFolder:
    """An output folder that this process alone works in, until it ends.

    Args:
        path: Made if it is not there.
        fresh: Whether to remove what an earlier quickstart made in it.

    Raises:
        ValueError: If the folder holds something else, or another quickstart works in it.
    """

    def __init__(self, path: str | os.PathLike[str], fresh: bool = False) -> None:
        self.root = Path(path).resolve()
        self.mark = self.root / MARK
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"output ({self.root}) must be a folder; it is a file.")
        if not self.mark.is_dir():
            self._refuse_foreign()
        self.mark.mkdir(parents=True, exist_ok=True)
        self._lock()
        end_processes(self.root)  # of a run that was killed
        if fresh:
            self.clear(KNOWN)
            for name in sorted(os.listdir(self.mark)):
                if name != "lock":
                    remove(self.mark / name)

    def _refuse_foreign(self) -> None:
        inside = sorted(os.listdir(self.root)) if self.root.exists() else []
        if inside:
            shown = ", ".join(inside[:3]) + (", ..." if len(inside) > 3 else "")
            raise ValueError(
                f"output ({self.root}) must be a new or empty folder or one that the quickstart "
                f"made; it holds {shown}. Choose another with --output."
            )

    def _lock(self) -> None:
        self._lock_file = (self.mark / "lock").open("a+")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.seek(0)
            owner = self._lock_file.read().strip() or "unknown"
            raise ValueError(
                f"output ({self.root}) is in use by another quickstart (process {owner}). Wait for "
                "it, or choose another folder with --output."
            ) from None
        except OSError:
            # Some network file systems have no locks: go on without.
            pass
        self._lock_file.truncate(0)
        self._lock_file.write(str(os.getpid()))
        self._lock_file.flush()

    def clear(self, names: tuple[str, ...]) -> None:
        """Removes files and folders of the run, by their names in it."""
        for name in names:
            if name not in KNOWN:
                raise AssertionError(f"{name} is not ours to remove")
            remove(self.root / name)


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder, if it is there; never follows a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
