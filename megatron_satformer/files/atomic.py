"""Files that appear whole or not at all.

A file is written under `<name>.partial` and renamed once it is complete and on disk. A kill at any
moment leaves the old file or the new one under the final name, never half of one. The partial file
is locked while its writer lives, so that two runs cannot mix; a stale one, left by a kill, is
simply taken over.
"""

import contextlib
import os
from pathlib import Path
from typing import IO

from megatron_satformer.files.locks import open_locked


class AtomicFile:
    """One output file, binary, in two steps: `seal` (complete, on disk) and `publish` (renamed).

    Args:
        path: Final name.

    Raises:
        ValueError: If another process is writing the same file now.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._done = False
        descriptor = open_locked(
            self.partial,
            os.O_RDWR | os.O_CREAT,
            busy=f"{path} is being written by another process ({self.partial} is locked). "
            "Wait for it, or choose another output.",
            gone=f"{path} was finished by another process just now. Look at it.",
        )
        os.ftruncate(descriptor, 0)
        self.file: IO[bytes] = os.fdopen(descriptor, "wb")

    def seal(self) -> None:
        """Brings every byte to disk, still under the partial name."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def publish(self) -> None:
        """Renames the sealed file to its final name."""
        os.replace(self.partial, self.path)
        self._done = True
        self.file.close()
        sync(self.path.parent)

    def discard(self) -> None:
        """Removes the partial file. Does nothing after `publish`."""
        if not self._done:
            self._done = True
            self.partial.unlink(missing_ok=True)
            # On a full disk the last flush fails once more; the file is gone anyway.
            with contextlib.suppress(OSError):
                self.file.close()

    def __enter__(self) -> "AtomicFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and not self._done:
            self.seal()
            self.publish()
        else:
            self.discard()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` to `path`, whole or not at all."""
    with AtomicFile(path) as output:
        output.file.write(content)


def sync(path: Path) -> None:
    """Brings a closed file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
