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
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_satformer.data.datasets.indexed import index_blocks
from megatron_satformer.data.datasets.manifest import (
    FORMAT,
    SUFFIX,
    VERSION,
    Checksum,
    describe_dataset,
    forget_dataset,
    manifest_path,
    write_manifest,
)
from megatron_satformer.data.preprocess.encoding import Encoded, KeyTokens
from megatron_satformer.data.preprocess.options import PreprocessOptions
from megatron_satformer.data.preprocess.run_identity import check_same_run, describe_run
from megatron_satformer.data.reading.chunks import Chunk
from megatron_satformer.data.reading.columns import row_group_of
from megatron_satformer.data.reading.inputs import Source, Unread
from megatron_satformer.data.reading.pieces import Piece
from megatron_satformer.files.atomic import sync, write_atomically
from megatron_satformer.files.locks import open_locked

REJECTS = ".rejects.jsonl"
# What a chunk's record counts, and a run adds up.
COUNTS = ("documents", "bytes", "file_bytes", "rejected", "verified", "routed")
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
        self.bin, self.index = folder / f"{name}.bin", folder / f"{name}.idx"
        self.lengths = folder / f"{name}.lengths"
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

    def complete(self) -> dict[str, Any]:
        """Writes the index; returns what the manifest says of the data set."""
        lengths: npt.NDArray[np.int32] = np.empty(0, dtype=LENGTH)
        if self.documents:
            lengths = np.memmap(self.lengths, dtype=LENGTH, mode="r", shape=(self.documents,))
        digest, size = hashlib.sha256(), 0
        with self.index.open("wb") as file:
            for block in index_blocks(self.dtype, lengths):
                size += file.write(block)
                digest.update(block)
        tokens = Checksum(self.tokens * self.dtype.itemsize, self.sha256.hexdigest())
        index = Checksum(size, digest.hexdigest())
        name = self.dtype.name
        return {
            **describe_dataset(self.documents, self.tokens, name, [tokens], index),
            "empty_documents": self.empty,
            "largest_token": self.largest,
        }

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
        options: Of the run.
        pieces: What it reads.

    Attributes:
        state: What the run was asked and how far it is; empty if there is none.
        spools: The data sets, while they are open.
        chunks: Chunks whose tokens are written.
        seen: Documents of each input that are in them.
        totals: What their records count.

    Raises:
        ValueError: If another process works there now.
    """

    def __init__(self, options: PreprocessOptions, pieces: Sequence[Piece]) -> None:
        self.options = options
        self.pieces = {piece.index: piece for piece in pieces}
        self.path = Path(f"{options.own_prefix}.partial")
        self.path.mkdir(parents=True, exist_ok=True)
        busy = f"output_prefix ({options.own_prefix}) is being written by another process"
        self._lock = open_locked(
            self.path / "lock",
            os.O_RDWR | os.O_CREAT,
            busy=f"{busy}. Wait for it, or choose another output.",
            gone=f"{busy}, which has just finished. Look at its output.",
        )
        self._state_path, self._journal_path = self.path / "run.json", self.path / "chunks.jsonl"
        self._rejects_path = self.path / "rejects.jsonl"
        self._open: list[IO[bytes]] = []
        self.state: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            self.state = json.loads(self._state_path.read_text())
        self.spools: list[Spool] = []
        self._count_nothing()

    def take_up(self, sources: Sequence[Source]) -> None:
        """Continues the unfinished run if it was asked the same, or begins a new one.

        Raises:
            ValueError: If it was asked something else and may not be overwritten.
        """
        asked = describe_run(self.options, sources)
        if self.state and not self.options.reads_stdin:
            try:
                check_same_run(self.state["asked"], asked, self.path)
                self.state["asked"] = asked
                return
            except ValueError:
                if not self.options.overwrite:
                    raise
        self.state = {"asked": asked}
        self.start(self.options.tokenizer_backend)

    def start(self, backend: str) -> None:
        """Forgets all work, and writes down by which tokenizer the run begins again."""
        self.close_files()
        for path in self.path.iterdir():
            if path.name not in ("lock", "run.json"):
                path.unlink()
        self.write_state(backend=backend)

    def write_state(self, **changes: Any) -> None:
        """Writes down what the run is to do, atomically."""
        self.state |= changes
        write_atomically(self._state_path, json.dumps(self.state).encode())

    def open_files(self, dtype: np.dtype[np.integer]) -> None:
        """Opens the data sets, cut to what the journal vouches for, and counts that."""
        self._count_nothing()
        self.spools = [Spool(self.path, Path(name).name, dtype) for name in self.options.prefixes]
        journal, rejects = _open_to_extend(self._journal_path), _open_to_extend(self._rejects_path)
        self._open = [journal, rejects]
        end = rejects_end = 0
        for record, position in _journal_records(journal):
            parts = zip(self.spools, record["keys"], strict=True)
            if not all(spool.replay(part) for spool, part in parts):
                # Its first data sets may have been counted: take up the chunks before it afresh.
                self.close_files()
                lines = self._journal_path.read_bytes().splitlines(keepends=True)[: self.chunks]
                write_atomically(self._journal_path, b"".join(lines))
                self.open_files(dtype)
                return
            self._count(record)
            end, rejects_end = position, record["rejects_end"]
        for spool in self.spools:
            spool.cut()
        for file, size in ((journal, end), (rejects, rejects_end)):
            file.seek(size)
            file.truncate()

    def _count_nothing(self) -> None:
        self.chunks = 0
        self.seen: Counter[int] = Counter()
        self.totals: Counter[str] = Counter()

    def _count(self, record: dict[str, Any]) -> None:
        self.chunks += 1
        self.seen[record["source"]] += record["documents"]
        self.totals.update({name: record[name] for name in COUNTS})

    def number_of(self, chunk: Chunk, offset: int = 0) -> int:
        """Returns which document of its input, from 1, stands at a place of the next chunk."""
        return self.pieces[chunk.index].lines_before + self.seen[chunk.index] + offset + 1

    def append(self, chunk: Chunk, encoded: Encoded) -> None:
        """Writes the tokens of a chunk and its bad documents, then the record that vouches."""
        keys = [spool.append(part) for spool, part in zip(self.spools, encoded.keys, strict=True)]
        journal, rejects = self._open
        for bad in encoded.rejected:
            number = self.number_of(chunk, bad.offset)
            group = row_group_of(chunk.source, number)
            reject = {
                "file": chunk.source.path,
                chunk.source.unit: number,
                **({"row_group": group} if group is not None else {}),
                "reason": bad.reason,
                "begins": bad.excerpt,
            }
            rejects.write(json.dumps(reject, ensure_ascii=False).encode() + b"\n")
        rejects.flush()
        record = {
            "source": chunk.index,
            "documents": encoded.documents,
            "bytes": encoded.text_bytes,
            "file_bytes": chunk.file_bytes,
            "rejected": len(encoded.rejected),
            "verified": encoded.verified,
            "routed": encoded.routed,
            "keys": keys,
            "rejects_end": rejects.tell(),
        }
        journal.write(json.dumps(record).encode() + b"\n")
        journal.flush()
        self._count(record)

    def publish(self, summary: dict[str, Any], unread: Sequence[Unread]) -> None:
        """Completes the files, whose data sets are open, and gives them their final names.

        Args:
            summary: Counts for the manifest.
            unread: Files that it lists as not read.
        """
        prefix, parent = self.options.own_prefix, self.path.parent
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "summary": summary,
            "asked": self.state["asked"],
            "unread": [{"file": one.path, "reason": one.reason} for one in unread],
            "datasets": {spool.name: spool.complete() for spool in self.spools},
        }
        write_manifest(self.path / f"data{SUFFIX}", manifest)
        # `.bin` before `.idx`, the manifest last.
        files = [*(spool.bin for spool in self.spools), *(spool.index for spool in self.spools)]
        finals = {file.name: os.fspath(parent / file.name) for file in files}
        rejects = Path(f"{prefix}{REJECTS}")
        if summary["rejected_documents"]:
            finals["rejects.jsonl"] = os.fspath(rejects)
        finals[f"data{SUFFIX}"] = os.fspath(manifest_path(prefix))
        for spool in self.spools:
            # Another manifest may describe what stood there before.
            forget_dataset(parent / spool.name)
        for name in finals:
            sync(self.path / name)
        self.write_state(summary=summary, publishing=finals)
        self.finish_publishing()
        if not summary["rejected_documents"]:
            # Of a run that this one replaces.
            rejects.unlink(missing_ok=True)

    def finish_publishing(self) -> None:
        """Does what is left of `publish`, however much was done, and removes the folder."""
        finals: dict[str, str] = self.state["publishing"]
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
        for path in sorted(self.path.iterdir(), key=lambda path: path == self._state_path):
            path.unlink(missing_ok=True)
        self.path.rmdir()

    def close_files(self) -> None:
        """Closes all files but the lock."""
        for spool in self.spools:
            spool.close()
        for file in self._open:
            with contextlib.suppress(OSError):
                file.close()
        self.spools, self._open = [], []

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
