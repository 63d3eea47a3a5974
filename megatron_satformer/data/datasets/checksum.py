"""The sha256 of a file, on a thread of its own, while the same bytes are copied or looked at."""

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

# What is read in one go: fits the second level of a processor's cache.
READ = 1 << 20
# How far the hash may be behind, in calls of `advance`: what it reads is then still in memory.
LAG = 4


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileHash:
    """sha256 of the bytes of a file from `begin` on, which grow by `advance`.

    hashlib and reading release Python's lock, so that another core does the work. Use as a context
    manager: leaving it stops the thread.

    Args:
        descriptor: The file, open for reading; its position is neither used nor moved.
        begin: First byte.
    """

    def __init__(self, descriptor: int, begin: int = 0) -> None:
        self._descriptor = descriptor
        self._digest = hashlib.sha256()
        self._end = begin
        self._buffer = memoryview(bytearray(READ))
        self._pool = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()

    def advance(self, size: int) -> None:
        """Adds the next `size` bytes, without waiting unless the thread is far behind.

        Raises:
            ValueError: If the file was shorter than that.
        """
        self._pending.append(self._pool.submit(self._add, self._end, size))
        self._end += size
        self._wait(LAG)

    def hexdigest(self) -> str:
        """Returns the sha256 of all the bytes so far, in hexadecimal."""
        self._wait(0)
        return self._digest.hexdigest()

    def restart(self) -> str:
        """Returns the sha256 of all the bytes so far, and begins anew with the next one."""
        digest = self.hexdigest()
        self._digest = hashlib.sha256()
        return digest

    def _wait(self, most: int) -> None:
        while len(self._pending) > most:
            self._pending.popleft().result()

    def _add(self, begin: int, size: int) -> None:
        end = begin + size
        while begin < end:
            count = os.preadv(self._descriptor, [self._buffer[: end - begin]], begin)
            if count == 0:
                raise ValueError(f"a file became shorter ({begin} bytes) while it was read.")
            self._digest.update(self._buffer[:count])
            begin += count

    def __enter__(self) -> "FileHash":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
