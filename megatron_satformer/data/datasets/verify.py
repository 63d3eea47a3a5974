"""Every byte of a data set looked at: structure, range of the tokens, checksums."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_satformer.data.datasets.byte_progress import byte_progress
from megatron_satformer.data.datasets.checksum import FileHash, file_sha256
from megatron_satformer.data.datasets.indexed import REMAKE, IndexedFile, bin_path, idx_path
from megatron_satformer.data.datasets.manifest import (
    Checksum,
    bin_parts,
    find_manifest,
    read_manifest,
)

# Bytes looked at in one go.
STEP = 1 << 22


@dataclass(frozen=True)
class Verification:
    """What a data set without fault was found to hold.

    Attributes:
        smallest_token: Smallest id; None without tokens.
        largest_token: Largest id; None without tokens.
        bin_checksums: Of `.bin`, in the parts that its manifest has; else of the whole.
        idx_sha256: Of `.idx`.
        manifest: Manifest it was compared with, or None where there is none.
    """

    smallest_token: int | None
    largest_token: int | None
    bin_checksums: list[Checksum]
    idx_sha256: str
    manifest: str | None


def verify_dataset(data: IndexedFile, vocab_size: int | None = None) -> Verification:
    """Reads a data set from end to end and checks it; opening it has checked its index.

    Args:
        data: The data set.
        vocab_size: Number of ids; None checks only that none is negative.

    Raises:
        ValueError: Naming the file and the place of the first fault.
    """
    if data.dtype.kind not in "iu":
        raise ValueError(f"{idx_path(data.prefix)} says {data.dtype.name}, not integers. {REMAKE}")
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size ({vocab_size}) must be at least 1. Pass the tokenizer's.")
    manifest, entry = _find_entry(data)
    # Before the tokens: it is small, and says where they are.
    idx = idx_path(data.prefix)
    idx_sha256 = file_sha256(idx)
    parts = [bin_path(data.prefix).stat().st_size]
    if entry is not None:
        _compare(idx, 0, Checksum(entry["idx"]["bytes"], idx_sha256), manifest, entry["idx"])
        parts = [part.bytes for part in bin_parts(entry)]
    smallest, largest, checksums = _read_tokens(data, vocab_size, parts)
    if entry is not None:
        begin = 0
        for found, said in zip(checksums, bin_parts(entry), strict=True):
            _compare(bin_path(data.prefix), begin, found, manifest, said._asdict())
            begin += found.bytes
    return Verification(
        smallest, largest, checksums, idx_sha256, str(manifest) if manifest else None
    )


def known_checksums(data: IndexedFile) -> list[Checksum] | None:
    """Returns what the manifest says of `.bin`, by parts; None where there is no manifest.

    Raises:
        ValueError: If sizes or counts are not those that the manifest says.
    """
    _, entry = _find_entry(data)
    return None if entry is None else bin_parts(entry)


def _find_entry(data: IndexedFile) -> tuple[Path | None, dict[str, Any] | None]:
    manifest = find_manifest(data.prefix)
    if manifest is None:
        return None, None
    entry = read_manifest(manifest)["datasets"][os.path.basename(data.prefix)]
    _compare_counts(data, manifest, entry)
    return manifest, entry


def _compare_counts(data: IndexedFile, manifest: Path, entry: dict[str, Any]) -> None:
    bin_file, idx_file = bin_path(data.prefix), idx_path(data.prefix)
    for path, what, found, said in (
        (bin_file, "bytes", bin_file.stat().st_size, entry["bin"]["bytes"]),
        (idx_file, "bytes", idx_file.stat().st_size, entry["idx"]["bytes"]),
        (idx_file, "documents", data.documents, entry["documents"]),
        (idx_file, "tokens", int(data.tokens.size), entry["tokens"]),
        (idx_file, "dtype", data.dtype.name, entry["dtype"]),
    ):
        if found != said:
            raise ValueError(
                f"{path} is not the file that {manifest} describes: {what} {found}, not {said}. "
                f"{REMAKE}"
            )


def _compare(
    path: Path, begin: int, found: Checksum, manifest: Path | None, said: dict[str, Any]
) -> None:
    if found.sha256 != said["sha256"]:
        raise ValueError(
            f"{path} is not the file that {manifest} describes: somewhere in the {found.bytes} "
            f"bytes from {begin} on one changed; their sha256 is {found.sha256}, not "
            f"{said['sha256']}. {REMAKE}"
        )


def _read_tokens(
    data: IndexedFile, vocab_size: int | None, parts: Sequence[int]
) -> tuple[int | None, int | None, list[Checksum]]:
    """Returns the smallest and the largest token, and the checksums of parts of so many bytes."""
    path = bin_path(data.prefix)
    smallest: int | None = None
    largest: int | None = None
    limit = np.iinfo(data.dtype).max + 1 if vocab_size is None else vocab_size
    checksums: list[Checksum] = []
    buffer = bytearray(STEP)
    with (
        path.open("rb", buffering=0) as file,
        FileHash(file.fileno()) as digest,
        byte_progress("verifying", sum(parts)) as progress,
    ):
        begin = 0
        for part in parts:
            end = begin + part
            while begin < end:
                count = os.preadv(file.fileno(), [memoryview(buffer)[: end - begin]], begin)
                if count == 0 or count % data.dtype.itemsize:
                    raise ValueError(
                        f"{path} became shorter ({begin + count} bytes) while it was read."
                    )
                digest.advance(count)
                block = np.frombuffer(buffer, dtype=data.dtype, count=count // data.dtype.itemsize)
                low, high = int(block.min()), int(block.max())
                if low < 0 or high >= limit:
                    wrong = int(((block < 0) | (block >= limit)).argmax())
                    _refuse_token(data, begin + wrong * data.dtype.itemsize, block[wrong], limit)
                smallest = low if smallest is None else min(smallest, low)
                largest = high if largest is None else max(largest, high)
                progress.update(count)
                begin += count
            checksums.append(Checksum(part, digest.restart()))
        return smallest, largest, checksums


def _refuse_token(data: IndexedFile, byte: int, token: npt.NDArray, limit: int) -> None:
    sequence = sum(int((starts <= byte).sum()) for starts in data.pointer_blocks()) - 1
    document = sum(int((bounds <= sequence).sum()) for bounds in data.boundary_blocks()) - 1
    raise ValueError(
        f"{bin_path(data.prefix)} must hold tokens in [0, {limit}); at byte {byte}, in document "
        f"{document} (sequence {sequence}), it has {token}. Check that the vocabulary is the one "
        "it was made with; otherwise copy the file again or tokenize again."
    )
