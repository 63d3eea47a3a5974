"""Locks on open files and folders. They are the operating system's, and end with their process.

What is locked is the file or folder that is being written, or a file in it: none is left beside the
output. Must not know: what is written, and how it is published.
"""

import os
from pathlib import Path

from filelock import lock_descriptor


def try_lock(descriptor: int) -> bool | None:
    """Locks an open file or folder, without waiting, until the descriptor is closed.

    Returns:
        Whether it is locked now; None where the file system has no locks, as some of networks have.
    """
    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError:
        return None


def open_locked(path: Path, flags: int, busy: str, gone: str | None = None) -> int:
    """Opens what one process alone may work on; closing it, or the end of the process, unlocks.

    Where the file system has no locks, work goes on without.

    Args:
        path: File or folder.
        flags: Of `os.open`.
        busy: What to tell if another process has it.
        gone: What to tell if that one removed or renamed it just now; `busy` if None.

    Returns:
        The descriptor.

    Raises:
        ValueError: `busy` or `gone`.
        OSError: If it cannot be opened.
    """
    descriptor = os.open(path, flags, 0o666)
    if try_lock(descriptor) is False:
        told: str | None = busy
    else:
        # Between our open and our lock its writer may have published or removed it.
        told = None if _is_there(path, descriptor) else gone or busy
    if told is not None:
        os.close(descriptor)
        raise ValueError(told)
    return descriptor


def _is_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
