"""What a data set holds: counts, sizes, and how long its documents are."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_satformer.data.datasets.indexed import (
    VERSION,
    IndexedFile,
    bin_path,
    check_prefix,
    idx_path,
)
from megatron_satformer.data.datasets.manifest import find_manifest

# Bits of a length that one pass of the median looks at.
DIGIT = 16


@dataclass(frozen=True)
class Bin:
    """Documents of `low` to `high` tokens: how many, and their tokens together."""

    low: int
    high: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class DatasetReport:
    """A data set.

    Attributes:
        prefix: Path without `.bin`.
        version: Of the index format.
        dtype: Name of the dtype of the tokens.
        sequences: Sequences: what Megatron's GPTDataset calls documents.
        documents: Documents, empty ones included.
        empty_documents: Documents without a token.
        tokens: Tokens.
        bin_bytes: Size of `.bin`.
        idx_bytes: Size of `.idx`.
        shortest: Tokens of the shortest document, empty ones included; 0 if there is none.
        mean: Tokens per document, likewise.
        median: Tokens of the document in the middle, likewise.
        longest: Tokens of the longest document.
        histogram: Lengths by powers of two, empty bins left out.
        manifest: Manifest that describes the data set, or None.
    """

    prefix: str
    version: int
    dtype: str
    sequences: int
    documents: int
    empty_documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    shortest: int
    mean: float
    median: float
    longest: int
    histogram: tuple[Bin, ...]
    manifest: str | None


def open_dataset(prefix: str | os.PathLike[str]) -> IndexedFile:
    """Opens the data set that a user names.

    Raises:
        ValueError: If it is not a prefix, or the data set is missing or damaged.
    """
    check_prefix("prefix", os.fspath(prefix))
    return IndexedFile(prefix)


def report_dataset(data: IndexedFile, histogram_bins: int = 64) -> DatasetReport:
    """Describes a data set. Memory does not grow with it.

    Args:
        data: The data set.
        histogram_bins: Most bins of the histogram; what is longer falls into the last.

    Raises:
        ValueError: If `histogram_bins` is below 1, or the manifest is damaged.
    """
    if histogram_bins < 1:
        raise ValueError(f"histogram_bins ({histogram_bins}) must be at least 1. Try 32.")
    documents, tokens = np.zeros(64, np.int64), np.zeros(64, np.int64)
    shortest, longest = np.iinfo(np.int64).max, 0
    for lengths in data.document_length_blocks():
        if not lengths.size:
            continue
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
        # The exponent that frexp gives is the number of bits: 0, 1, 2-3, 4-7 ...
        bits = np.frexp(lengths.astype(np.float64))[1]
        documents += np.bincount(bits, minlength=64)
        tokens += np.bincount(bits, weights=lengths, minlength=64).astype(np.int64)
    count = data.documents
    manifest = find_manifest(data.prefix)
    return DatasetReport(
        prefix=data.prefix,
        version=VERSION,
        dtype=data.dtype.name,
        sequences=len(data),
        documents=count,
        empty_documents=int(documents[0]),
        tokens=int(data.tokens.size),
        bin_bytes=bin_path(data.prefix).stat().st_size,
        idx_bytes=idx_path(data.prefix).stat().st_size,
        shortest=min(shortest, longest),
        mean=data.tokens.size / count if count else 0.0,
        median=_median(data, longest),
        longest=longest,
        histogram=_bins(documents, tokens, longest, histogram_bins),
        manifest=str(manifest) if manifest else None,
    )


def _bins(documents: np.ndarray, tokens: np.ndarray, longest: int, most: int) -> tuple[Bin, ...]:
    used = np.flatnonzero(documents).tolist()
    head, tail = used[: most - 1], used[most - 1 :]
    groups = [[bit] for bit in head] + ([tail] if tail else [])
    return tuple(
        Bin(
            (1 << group[0]) >> 1,
            min((1 << group[-1]) - 1, longest),
            int(documents[group].sum()),
            int(tokens[group].sum()),
        )
        for group in groups
    )


def _median(data: IndexedFile, longest: int) -> float:
    count = data.documents
    if count == 0:
        return 0.0
    upper = _length_of_rank(data, count // 2, longest)
    lower = upper if count % 2 else _length_of_rank(data, count // 2 - 1, longest)
    return (lower + upper) / 2


def _length_of_rank(data: IndexedFile, rank: int, longest: int) -> int:
    """Returns the length that `rank` documents are shorter than or equal to, exactly.

    A few bits of the answer in each pass: no more than 2^DIGIT counters in memory.
    """
    low, bits = 0, longest.bit_length()
    while bits > 0:
        high = low + (1 << bits)
        digits = min(DIGIT, bits)
        bits -= digits
        counts = np.zeros(1 << digits, np.int64)
        for lengths in data.document_length_blocks():
            inside = lengths[(lengths >= low) & (lengths < high)]
            counts += np.bincount((inside - low) >> bits, minlength=1 << digits)
        digit = int(np.searchsorted(np.cumsum(counts), rank, side="right"))
        rank -= int(counts[:digit].sum())
        low += digit << bits
    return low


def render_report(report: DatasetReport) -> str:
    """Returns the report as text."""
    sizes = f"{Path(bin_path(report.prefix)).name} {report.bin_bytes:,} bytes, .idx "
    lines = [
        f"{report.prefix}: {report.dtype}, index version {report.version}",
        f"  documents  {report.documents:,} ({report.empty_documents:,} empty), in "
        f"{report.sequences:,} sequences",
        f"  tokens     {report.tokens:,}",
        f"  files      {sizes}{report.idx_bytes:,} bytes",
        f"  manifest   {report.manifest or 'none'}",
        f"  length     min {report.shortest:,}, mean {report.mean:,.1f}, median "
        f"{report.median:,.1f}, max {report.longest:,} tokens",
    ]
    largest = max((one.documents for one in report.histogram), default=1)
    for one in report.histogram:
        name = f"{one.low:,}" if one.low == one.high else f"{one.low:,}-{one.high:,}"
        share = 100 * one.documents / report.documents
        bar = "#" * -(-40 * one.documents // largest)
        lines.append(f"  {name:>23} {one.documents:>14,} {share:5.1f}% {bar}")
    return "\n".join(lines)
