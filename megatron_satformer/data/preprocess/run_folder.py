"""The folder `<output prefix>.partial`: where a run keeps its work until all of it is complete.

    run.json       what the run was asked to do; a run with another answer may not continue it
    chunks.jsonl   one line for each chunk whose tokens are written: counts and sha256
    NAME.bin       tokens of a data set so far
    NAME.lengths   tokens of each document so far, int32
    rejects.jsonl  bad documents so far

A kill at any moment leaves a folder that the same command continues: what the journal does not
vouch for is cut off. At the end the files get their final names; `run.json` says so beforehand, so
that a kill between two renames is continued too.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_satformer.data.preprocess.encoding import KeyTokens
from megatron_satformer.files.atomic import sync, write_atomically
from megatron_satformer.files.locks import open_locked

BLOCK = 1 << 20
LENGTH = np.dtype("<i4")


class Spool:
    """The tokens and document lengths of one data set while it grows.

    Args:
        folder: Where its files are.
        name: Of the data set.
        dtype: Of the tokens.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype[np.integer]) -> None:
        self.name = name
        self.dtype = dtype
        self.bin, self.lengths = folder / f"{name}.bin", folder / f"{name}.lengths"
        self.documents = self.tokens = self.empty = 0
        self.largest = -1
        self.sha256 = hashlib.sha256()
        self._lengths_sha256 = hashlib.sha256()
        self._files = [_open_to_extend(path) for path in (self.bin, self.lengths)]

    def append(self, part: KeyTokens) -> list[Any]:
        """Adds the tokens of a chunk; returns what `replay` needs to find it again.

        Its checksums are of the two files up to and with this chunk: one hash serves the journal
        and the manifest.
        """
        for file, content in zip(self._files, (part.ids, part.lengths), strict=True):
            file.write(content.data)
            file.flush()
        self._count(part.ids, part.lengths, part.empty, part.largest)
        return [len(part.lengths), part.ids.size, part.empty, part.largest, *self._checksums()]

    def replay(self, record: Sequence[Any]) -> bool:
        """Takes up a chunk that a run before has written; False if it is not there unharmed."""
        documents, tokens, empty, largest, *checksums = record
        ids = self._files[0].read(tokens * self.dtype.itemsize)
        lengths = self._files[1].read(documents * LENGTH.itemsize)
        if len(ids) < tokens * self.dtype.itemsize or len(lengths) < documents * LENGTH.itemsize:
            return False
        self._count(np.frombuffer(ids, self.dtype), np.frombuffer(lengths, LENGTH), empty, largest)
        return self._checksums() == checksums

    def _checksums(self) -> list[str]:
        return [self.sha256.copy().hexdigest(), self._lengths_sha256.copy().hexdigest()]

    def _count(
        self, ids: npt.NDArray, lengths: npt.NDArray[np.int32], empty: int, largest: int
    ) -> None:
        self.sha256.update(ids)
        self._lengths_sha256.update(lengths)
        self.documents += len(lengths)
        self.tokens += ids.size
        self.empty += empty
        self.largest = max(self.largest, largest)

    def cut(self) -> None:
        """Cuts off whatever comes after the chunks taken up."""
        for file, size in zip(
            self._files,
            (self.tokens * self.dtype.itemsize, self.documents * LENGTH.itemsize),
            strict=True,
        ):
            file.seek(size)
            file.truncate()

    def open_lengths(self) -> npt.NDArray[np.int32]:
        """Returns the length of every document, memory mapped: [documents]."""
        if self.documents == 0:
            return np.empty(0, dtype=LENGTH)
        return np.memmap(self.lengths, dtype=LENGTH, mode="r", shape=(self.documents,))

    def sync(self) -> None:
        """Brings the tokens to disk."""
        for file in self._files:
            os.fsync(file.fileno())

    def close(self) -> None:
        """Closes the files."""
        for file in self._files:
            # On a full disk the last flush fails once more.
            with contextlib.suppress(OSError):
                file.close()


def _open_to_extend(path: Path) -> IO[bytes]:
    path.touch()
    return path.open("r+b")


class RunFolder:
    """One run's folder, locked while open.

    Args:
        prefix: Output prefix of the run.

    Raises:
        ValueError: If another process works there now.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.path = Path(f"{os.fspath(prefix)}.partial")
        self.path.mkdir(parents=True, exist_ok=True)
        busy = f"output_prefix ({prefix}) is being written by another process"
        self._lock = open_locked(
            self.path / "lock",
            os.O_RDWR | os.O_CREAT,
            busy=f"{busy}. Wait for it, or choose another output.",
            gone=f"{busy}, which has just finished. Look at its output.",
        )
        self._state, self._journal_path = self.path / "run.json", self.path / "chunks.jsonl"
        self._rejects_path = self.path / "rejects.jsonl"
        self._open: list[IO[bytes]] = []
        self._spools: list[Spool] = []

    def read_state(self) -> dict[str, Any] | None:
        """Returns what an unfinished run wrote by `start`, or None if there is none."""
        try:
            state: dict[str, Any] = json.loads(self._state.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return state

    def start(self, state: dict[str, Any]) -> None:
        """Forgets all work and writes down what the new run is to do."""
        self.close_files()
        for path in self.path.iterdir():
            if path.name not in ("lock", "run.json"):
                path.unlink()
        self.write_state(state)

    def write_state(self, state: dict[str, Any]) -> None:
        """Writes down what the run is to do, atomically."""
        write_atomically(self._state, json.dumps(state).encode())

    def open_files(
        self, names: Sequence[str], dtype: np.dtype[np.integer]
    ) -> tuple[list[Spool], list[dict[str, Any]]]:
        """Opens the data sets, cut to what the journal vouches for, and returns its records too."""
        self._spools = [Spool(self.path, name, dtype) for name in names]
        journal, rejects = _open_to_extend(self._journal_path), _open_to_extend(self._rejects_path)
        self._open = [journal, rejects]
        records: list[dict[str, Any]] = []
        end = 0
        for record, position in _journal_records(journal):
            parts = zip(self._spools, record["keys"], strict=True)
            if not all(spool.replay(part) for spool, part in parts):
                # Its first data sets may have been counted: take up the chunks before it afresh.
                return self._reopen_before(len(records), names, dtype)
            records.append(record)
            end = position
        for spool in self._spools:
            spool.cut()
        journal.seek(end)
        journal.truncate()
        rejects.seek(records[-1]["rejects_end"] if records else 0)
        rejects.truncate()
        return self._spools, records

    def _reopen_before(
        self, count: int, names: Sequence[str], dtype: np.dtype[np.integer]
    ) -> tuple[list[Spool], list[dict[str, Any]]]:
        self.close_files()
        lines = self._journal_path.read_bytes().splitlines(keepends=True)[:count]
        write_atomically(self._journal_path, b"".join(lines))
        return self.open_files(names, dtype)

    def append(
        self, record: dict[str, Any], parts: Sequence[KeyTokens], rejects: Sequence[dict[str, Any]]
    ) -> None:
        """Writes the tokens of a chunk, then the record that vouches for them."""
        keys = [spool.append(part) for spool, part in zip(self._spools, parts, strict=True)]
        journal, rejects_file = self._open
        for reject in rejects:
            rejects_file.write(json.dumps(reject, ensure_ascii=False).encode() + b"\n")
        rejects_file.flush()
        record = {**record, "keys": keys, "rejects_end": rejects_file.tell()}
        journal.write(json.dumps(record).encode() + b"\n")
        journal.flush()

    def publish(self, state: dict[str, Any], finals: dict[str, str]) -> None:
        """Gives complete files their final names.

        Args:
            state: What the run is to do.
            finals: Name in this folder to final path; `.bin` before `.idx`, the manifest last.
        """
        for name in finals:
            sync(self.path / name)
        self.write_state({**state, "publishing": finals})
        self.finish_publishing(finals)

    def finish_publishing(self, finals: dict[str, str]) -> None:
        """Does what is left of `publish`, however much was done, and removes the folder."""
        for name, final in finals.items():
            # What stands there is from before: it must never stand beside new tokens.
            if not name.endswith(".bin") and (self.path / name).exists():
                Path(final).unlink(missing_ok=True)
        for name, final in finals.items():
            if (self.path / name).exists():
                os.replace(self.path / name, final)
        sync(self.path.parent)
        self.remove()

    def is_empty(self) -> bool:
        """Returns whether there is no finished chunk that a next run could continue from."""
        if not self.path.exists():
            return False
        return not self._journal_path.exists() or not self._journal_path.stat().st_size

    def remove(self) -> None:
        """Removes the folder and all work in it."""
        self.close_files()
        # What says how to go on goes last.
        for path in sorted(self.path.iterdir(), key=lambda path: path == self._state):
            path.unlink(missing_ok=True)
        self.path.rmdir()

    def close_files(self) -> None:
        """Closes all files but the lock."""
        for spool in self._spools:
            spool.close()
        for file in self._open:
            with contextlib.suppress(OSError):
                file.close()
        self._spools, self._open = [], []

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close_files()
        os.close(self._lock)


def _journal_records(journal: IO[bytes]) -> Iterator[tuple[dict[str, Any], int]]:
    """Yields each complete record and where it ends; the last one may be torn."""
    for line in journal:
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
        except ValueError:
            return
        yield record, journal.tell()
