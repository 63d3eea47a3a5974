"""Output folders that appear whole or not at all, and are never overwritten by mistake.

Must not know: what is written into them.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def check_target(save: Path, marker: str, overwrite: bool) -> None:
    """Refuses a folder that would be lost.

    Args:
        save: Folder to make; missing or empty is always right.
        marker: File by which an earlier output of the same kind is known, such as "config.json".
        overwrite: Whether such an earlier output may be replaced.

    Raises:
        ValueError: Says what stands there.
    """
    if not save.exists() or (save.is_dir() and not any(save.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"save ({save}) exists already. Pass --overwrite, or choose another.")
    if not (save / marker).is_file():
        raise ValueError(
            f"save ({save}) is not an earlier output of this command (it has no {marker}), so it "
            "is not overwritten. Choose another."
        )


def check_space(folder: Path, needed: int) -> None:
    """Looks whether `needed` bytes fit on the file system of `folder`.

    Raises:
        ValueError: If they do not.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, the model needs {needed / 1e9:.1f} GB."
        )


@contextlib.contextmanager
def written_atomically(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place once the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        os.replace(partial, target)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(partial, ignore_errors=True)
        raise
