"""Output folders that appear whole or not at all, and are never overwritten by mistake.

Must not know: what is written into them.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_satformer.files.atomic import sync
from megatron_satformer.files.locks import open_locked


def check_target(save: Path, marker: str, overwrite: bool, option: str = "save") -> None:
    """Refuses a folder that would be lost.

    Args:
        save: Folder to make; missing or empty is always right.
        marker: File by which an earlier output of the same kind is known, such as "config.json".
        overwrite: Whether such an earlier output may be replaced.
        option: Its name in the message.

    Raises:
        ValueError: Says what stands there.
    """
    if not save.exists() or (save.is_dir() and not any(save.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{option} ({save}) exists already. Pass --overwrite, or choose another.")
    if not (save / marker).is_file():
        raise ValueError(
            f"{option} ({save}) is not an earlier output of this command (it has no {marker}), so "
            "it is not overwritten. Choose another."
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
def written_atomically(target: Path, option: str = "save") -> Iterator[Path]:
    """A folder beside `target` that takes its place once the block ends without an error.

    It is locked while its writer lives; what a kill has left of an earlier one is removed. Until
    the end, `target` is as it was.

    Args:
        target: Folder to make. What stands there when the block begins is replaced; call
            `check_target` in the block, under the lock, to be sure of it.
        option: Its name in messages.

    Raises:
        ValueError: If the folder cannot be made, another process is writing it, or one has made it
            in the meantime.
    """
    # as one name, so that "." and a link work: the partial folder must lie on the same disk
    target = Path(os.path.realpath(target))
    partial = target.with_name(f".{target.name}.partial")
    old = target.with_name(f".{target.name}.old")
    lock = _make_and_lock(partial, target, option)
    try:
        if old.exists() and not target.exists():
            os.replace(old, target)  # a kill came between the two steps of `_publish`
        shutil.rmtree(old, ignore_errors=True)
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        replaces = target.exists()
        yield partial
        # Every file: a rename may outlive a power cut that its content does not.
        for path in (*partial.rglob("*"), partial):
            sync(path)
        _publish(partial, target, old if replaces else None)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _make_and_lock(partial: Path, target: Path, option: str) -> int:
    """Returns a descriptor of the folder; closing it, or the end of the process, unlocks."""
    busy = f"{option} ({target}) is being written by another process. Wait, or end it."
    try:
        partial.mkdir(parents=True, exist_ok=True)
        return open_locked(partial, os.O_RDONLY | os.O_DIRECTORY, busy)
    except OSError as error:
        raise ValueError(
            f"{option} ({target}) cannot be made: {error.strerror}, {error.filename}. Choose a "
            "place where folders may be made."
        ) from None


def _publish(partial: Path, target: Path, old: Path | None) -> None:
    if old is not None:
        os.replace(target, old)
    try:
        os.rename(partial, target)
    except OSError as error:
        if old is not None or not target.exists():
            raise
        raise ValueError(
            f"save ({target}) was made by another process in the meantime ({error.strerror}). "
            "Look at it, or choose another."
        ) from None
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
