"""Several data sets made into one, byte for byte as Megatron's tools/merge_datasets.py does it.

Tokens are copied by the kernel where it can; of the indexes no more than a block is in memory.
Source: IndexedDatasetBuilder.add_index in megatron/core/datasets/indexed_dataset.py (0.19.2).
"""

import errno
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_satformer.data.datasets.byte_progress import byte_progress
from megatron_satformer.data.datasets.checksum import FileHash, file_sha256
from megatron_satformer.data.datasets.indexed import (
    CODES,
    HEADER,
    MAGIC,
    VERSION,
    IndexedFile,
    bin_path,
    check_output_free,
    check_prefix,
    idx_path,
)
from megatron_satformer.data.datasets.manifest import (
    Checksum,
    describe_dataset,
    forget_dataset,
    manifest_path,
    read_manifest,
    record_dataset,
)
from megatron_satformer.data.datasets.parts import check_all_parts
from megatron_satformer.data.datasets.verify import known_checksums
from megatron_satformer.files.atomic import AtomicFile

# Bytes copied in one go, between two updates of the progress and the hash.
STEP = 1 << 24
# Bytes after which the copy is sent to the disk: little is left to wait for at the end then.
FLUSH = 1 << 28
# What copy_file_range says where it cannot work: two file systems, or one that lacks it.
CANNOT = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True)
class Part:
    """One checked data set: its prefix, what it holds, and the checksums in its manifest."""

    prefix: str
    dtype: np.dtype
    sequences: int
    documents: int
    tokens: int
    checksums: list[Checksum] | None


@dataclass(frozen=True)
class MergeSummary:
    """What was merged: data sets, their documents and tokens, bytes written, the tokens' dtype."""

    datasets: int
    documents: int
    tokens: int
    bytes: int
    dtype: str


def merge_datasets(
    inputs: Sequence[str], output_prefix: str, overwrite: bool = False, sha256: bool = True
) -> MergeSummary:
    """Merges data sets into `output_prefix`.

    Args:
        inputs: Prefixes, in the order in which to merge them; a folder stands for all that it
            holds, sorted by name.
        output_prefix: Path of the result, without `.bin`.
        overwrite: Whether an existing data set may be replaced.
        sha256: Whether to write a manifest with checksums: those that the inputs' manifests have,
            so that what has changed since they were made is found, and fresh ones, which take a
            second core, for inputs without.

    Raises:
        ValueError: If an input is missing or damaged, the data sets do not fit together, some of
            the parts that one was made in are missing, the output exists, or the disk is too
            small. Nothing is written then.
    """
    check_prefix("output_prefix", output_prefix)
    prefixes = find_prefixes(inputs, output_prefix)
    check_all_parts(prefixes)
    check_output_free(output_prefix, overwrite)
    manifest = manifest_path(output_prefix)
    if manifest.exists():
        read_manifest(manifest)
    parts = [_describe(prefix) for prefix in prefixes]
    for part in parts[1:]:
        if part.dtype != parts[0].dtype:
            raise ValueError(
                f"input ({idx_path(part.prefix)}) holds {part.dtype.name} tokens, but "
                f"{idx_path(parts[0].prefix)} holds {parts[0].dtype.name}: they come from "
                "vocabularies of different size. Tokenize both with the same tokenizer."
            )
    size = _index_size(parts) + sum(part.tokens for part in parts) * parts[0].dtype.itemsize
    _check_space(output_prefix, size)
    with ExitStack() as stack:
        tokens = AtomicFile(bin_path(output_prefix))
        stack.callback(tokens.discard)
        index = AtomicFile(idx_path(output_prefix))
        stack.callback(index.discard)
        progress = stack.enter_context(byte_progress("merging", size))
        checksums = _write_tokens(parts, tokens, sha256, progress)
        _write_index(parts, index, progress)
        tokens.seal()
        index.seal()
        documents = sum(part.documents for part in parts)
        count = sum(part.tokens for part in parts)
        dtype = parts[0].dtype.name
        entry = None
        if sha256:
            idx_file = Checksum(index.partial.stat().st_size, file_sha256(index.partial))
            entry = describe_dataset(documents, count, dtype, checksums, idx_file)
        # Neither an old index nor an old checksum may ever stand beside new tokens.
        forget_dataset(output_prefix)
        index.path.unlink(missing_ok=True)
        tokens.publish()
        index.publish()
    if entry is not None:
        record_dataset(manifest, os.path.basename(output_prefix), entry)
    return MergeSummary(len(parts), documents, count, size, dtype)


def find_prefixes(inputs: Sequence[str], output_prefix: str) -> list[str]:
    """Returns the prefixes that `inputs` name, folders resolved.

    Raises:
        ValueError: If a data set is named twice or is the output, a folder holds none, half of one
            or an unfinished one, or a name is both a folder and a data set.
    """
    prefixes: list[str] = []
    for name in inputs:
        is_dataset = bool(name) and (idx_path(name).exists() or bin_path(name).exists())
        if os.path.isdir(name) and not is_dataset:
            prefixes += _prefixes_in(name, output_prefix)
        elif is_dataset and os.path.isdir(name) and _has_datasets(name):
            raise ValueError(
                f"input ({name}) must be one thing, but is a folder of data sets and the data set "
                f"{idx_path(name)} too. Write {name}/ for the folder, or rename one."
            )
        else:
            if name.endswith("/"):
                raise ValueError(f"input ({name}) must be a folder, but there is none. Check it.")
            check_prefix("input", name)
            prefixes.append(name)
    seen: dict[str, str] = {}
    for prefix in prefixes:
        real = os.path.realpath(idx_path(prefix))
        if real in seen:
            raise ValueError(
                f"input ({prefix}) must be named once; {seen[real]} is the same. To train on it "
                "more often, give it a weight in --data-path."
            )
        seen[real] = prefix
        for ours, theirs in zip(_files(output_prefix), _files(prefix), strict=True):
            if ours.exists() and theirs.exists() and ours.samefile(theirs):
                raise ValueError(
                    f"output_prefix ({output_prefix}) must not be among the inputs, but {theirs} "
                    "is. Choose another output, or move it away."
                )
    return prefixes


def _files(prefix: str) -> tuple[Path, Path]:
    return bin_path(prefix), idx_path(prefix)


def _has_datasets(folder: str) -> bool:
    return any(name.endswith(".idx") for name in os.listdir(folder))


def _prefixes_in(folder: str, output_prefix: str) -> list[str]:
    """Returns the data sets in a folder, in Megatron's order: sorted by name."""
    own = {os.path.realpath(f"{path}.partial") for path in _files(output_prefix)}
    names = set()
    for file in os.listdir(folder):
        path = os.path.join(folder, file)
        stem, ending = os.path.splitext(file)
        if ending == ".partial" and os.path.realpath(path) not in own:
            raise ValueError(
                f"input ({folder}) must hold finished data sets alone, but {path} is being "
                "written, or was when its writer was killed. Finish it, remove it, or name the "
                "prefixes one by one."
            )
        if ending in (".bin", ".idx") and stem and os.path.isfile(path):
            names.add(stem)
    if not names:
        raise ValueError(
            f"input ({folder}) must hold data sets, but there is no .idx file in it. Name another."
        )
    return [os.path.join(folder, name) for name in sorted(names)]


def _describe(prefix: str) -> Part:
    """Checks a data set. Keeps none of its files open: there may be thousands."""
    try:
        data = IndexedFile(prefix)
        checksums = known_checksums(data)
    except ValueError as error:
        raise ValueError(f"input ({prefix}) must be a complete data set: {error}") from None
    return Part(prefix, data.dtype, len(data), data.documents, int(data.tokens.size), checksums)


def _index_size(parts: Sequence[Part]) -> int:
    sequences = sum(part.sequences for part in parts)
    return HEADER.size + 12 * sequences + 8 * (1 + sum(part.documents for part in parts))


def _check_space(output_prefix: str, size: int) -> None:
    folder = Path(output_prefix).absolute().parent
    while not folder.exists():
        folder = folder.parent
    # What a killed run left is taken over.
    left = [Path(f"{path}.partial") for path in _files(output_prefix)]
    free = shutil.disk_usage(folder).free + sum(p.stat().st_size for p in left if p.exists())
    if free < size:
        raise ValueError(
            f"output_prefix ({output_prefix}) must have room for {size / 1e9:.3f} GB; {folder} has "
            f"{free / 1e9:.3f} GB free. Make room, or choose another disk."
        )


def _write_tokens(
    parts: Sequence[Part], output: AtomicFile, sha256: bool, progress: tqdm
) -> list[Checksum]:
    """Writes `.bin`; returns the checksums known and, with `sha256`, those of the other parts."""
    target, begin, flushed = output.file.fileno(), 0, 0
    flush: Future[None] | None = None
    checksums: list[Checksum] = []
    with ThreadPoolExecutor(1) as pool:
        for part in parts:
            source = bin_path(part.prefix)
            offset, end = 0, part.tokens * part.dtype.itemsize
            with ExitStack() as stack:
                file = stack.enter_context(source.open("rb"))
                digest = None
                if sha256 and part.checksums is None:
                    # It follows the copy, reading what was written.
                    digest = stack.enter_context(FileHash(target, begin))
                while offset < end:
                    count = _copy(source, file.fileno(), offset, output, begin, end - offset)
                    if digest is not None:
                        digest.advance(count)
                    progress.update(count)
                    offset += count
                    begin += count
                    if begin - flushed >= FLUSH and (flush is None or flush.done()):
                        if flush is not None:
                            flush.result()
                        flush, flushed = pool.submit(os.fdatasync, target), begin
                fresh = [] if digest is None else [Checksum(end, digest.hexdigest())]
                checksums += fresh if part.checksums is None else part.checksums
        # The kernel reports a failed write once: here, or never.
        if flush is not None:
            flush.result()
    return checksums


def _copy(path: Path, source: int, offset: int, output: AtomicFile, begin: int, wanted: int) -> int:
    """Copies at most STEP bytes from one file to another and returns how many."""
    target = output.file.fileno()
    wanted = min(wanted, STEP)
    try:
        try:
            count = os.copy_file_range(source, target, wanted, offset, begin)
        except OSError as error:
            if error.errno not in CANNOT:
                raise
            count = 0
        # Some file systems copy nothing without saying why.
        if count == 0:
            count = os.pwrite(target, os.pread(source, wanted, offset), begin)
    except OSError as error:
        names = (os.fspath(path), None, os.fspath(output.partial))
        raise OSError(error.errno, error.strerror, *names) from None
    if count == 0:
        raise ValueError(f"{path} became shorter ({offset} bytes) while it was read. Merge again.")
    return count


def _write_index(parts: Sequence[Part], output: AtomicFile, progress: tqdm) -> None:
    """Writes `.idx`: the parts' rows, moved up by what comes before them."""
    sequences = sum(part.sequences for part in parts)
    documents = sum(part.documents for part in parts)
    dtype = parts[0].dtype
    file = output.file
    file.write(HEADER.pack(MAGIC, VERSION, CODES[dtype], sequences, documents + 1))
    at_lengths = HEADER.size
    at_pointers = at_lengths + 4 * sequences
    at_boundaries = at_pointers + 8 * sequences
    file.seek(at_boundaries)
    file.write(bytes(8))
    at_boundaries += 8
    before_bytes, before_sequences = 0, 0
    for part in parts:
        data = IndexedFile(part.prefix)
        now = (data.dtype, len(data), data.documents, int(data.tokens.size))
        if now != (part.dtype, part.sequences, part.documents, part.tokens):
            raise ValueError(f"{idx_path(part.prefix)} changed while it was read. Merge again.")
        file.seek(at_lengths)
        for rows in data.length_blocks():
            at_lengths += file.write(rows.data)
        file.seek(at_pointers)
        for rows in data.pointer_blocks():
            at_pointers += file.write((rows + before_bytes).data)
        file.seek(at_boundaries)
        skip = 1
        for rows in data.boundary_blocks():
            at_boundaries += file.write((rows[skip:] + before_sequences).data)
            skip = 0
        before_bytes += part.tokens * dtype.itemsize
        before_sequences += part.sequences
        progress.update(12 * part.sequences + 8 * part.documents)
