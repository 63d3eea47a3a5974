"""Every byte of a data set looked at: structure, range of the tokens, checksums."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_satformer.data.datasets.byte_progress import ByteProgress
from megatron_satformer.data.datasets.checksum import FileHash, file_sha256
from megatron_satformer.data.datasets.indexed import REMAKE, IndexedFile, bin_path, idx_path
from megatron_satformer.data.datasets.manifest import find_manifest, read_manifest

# Bytes looked at in one go.
STEP = 1 << 22


@dataclass(frozen=True)
class Verification:
    """What a data set without fault was found to hold.

    Attributes:
        smallest_token: Smallest id; None without tokens.
        largest_token: Largest id; None without tokens.
        bin_sha256: Of `.bin`.
        idx_sha256: Of `.idx`.
        manifest: Manifest it was compared with, or None where there is none.
    """

    smallest_token: int | None
    largest_token: int | None
    bin_sha256: str
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
    manifest = find_manifest(data.prefix)
    entry = None
    if manifest is not None:
        entry = read_manifest(manifest)["datasets"][os.path.basename(data.prefix)]
        _compare_counts(data, manifest, entry)
    # Before the tokens: it is small, and says where they are.
    idx_sha256 = file_sha256(idx_path(data.prefix))
    if manifest is not None and entry is not None:
        _compare_sha256(idx_path(data.prefix), idx_sha256, manifest, entry["idx"])
    smallest, largest, bin_sha256 = _read_tokens(data, vocab_size)
    if manifest is not None and entry is not None:
        _compare_sha256(bin_path(data.prefix), bin_sha256, manifest, entry["bin"])
    return Verification(
        smallest, largest, bin_sha256, idx_sha256, str(manifest) if manifest else None
    )


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


def _compare_sha256(path: Path, found: str, manifest: Path, entry: dict[str, Any]) -> None:
    if found != entry["sha256"]:
        raise ValueError(
            f"{path} is not the file that {manifest} describes: somewhere in its {entry['bytes']} "
            f"bytes one changed; its sha256 is {found}, not {entry['sha256']}. {REMAKE}"
        )


def _read_tokens(data: IndexedFile, vocab_size: int | None) -> tuple[int | None, int | None, str]:
    """Returns the smallest and the largest token, and the sha256 of `.bin`."""
    path = bin_path(data.prefix)
    size = path.stat().st_size
    smallest: int | None = None
    largest: int | None = None
    limit = np.iinfo(data.dtype).max + 1 if vocab_size is None else vocab_size
    buffer = bytearray(STEP)
    with (
        path.open("rb", buffering=0) as file,
        FileHash(file.fileno()) as digest,
        ByteProgress("verifying", size) as progress,
    ):
        begin = 0
        while begin < size:
            count = os.preadv(file.fileno(), [memoryview(buffer)[: size - begin]], begin)
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
            progress.advance(count)
            begin += count
        return smallest, largest, digest.hexdigest()


def _refuse_token(data: IndexedFile, byte: int, token: npt.NDArray, limit: int) -> None:
    sequence = sum(int((starts <= byte).sum()) for starts in data.pointer_blocks()) - 1
    document = sum(int((bounds <= sequence).sum()) for bounds in data.boundary_blocks()) - 1
    raise ValueError(
        f"{bin_path(data.prefix)} must hold tokens in [0, {limit}); at byte {byte}, in document "
        f"{document} (sequence {sequence}), it has {token}. Check that the vocabulary is the one "
        "it was made with; otherwise copy the file again or tokenize again."
    )
