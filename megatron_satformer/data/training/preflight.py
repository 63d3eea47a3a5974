"""Checks of the training data before any work starts, in the place of a crash or a hang later.

Everything passed in is a plain value; Megatron's objects are not known here.
"""

import glob
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_satformer.data.datasets.indexed import IndexedFile
from megatron_satformer.data.datasets.manifest import find_manifest
from megatron_satformer.data.datasets.verify import verify_dataset
from megatron_satformer.data.training.blend import (
    DEFAULT_SPLIT,
    SPLITS,
    documents_needed,
    parse_blend,
    parse_split,
    split_documents,
)
from megatron_satformer.data.training.data_paths import (
    check_validation_sets,
    read_data_paths,
    read_json,
)
from megatron_satformer.data.training.samples import Share, check_plan

# Tokens looked at for the largest id, per data set: 4 GB of uint16, about two seconds from memory.
SCAN_TOKENS = 1 << 31
SCAN_BLOCK = 1 << 24
OBJECT_STORAGE = ("s3://", "msc://")


@dataclass(frozen=True)
class DatasetSummary:
    """One checked data set.

    Attributes:
        prefix: Its path without `.bin`.
        documents: Sequences in it, which is what Megatron splits by.
        tokens: Tokens in it.
        split_documents: Documents that train, valid and test get.
        split_tokens: Tokens that train, valid and test get, per epoch.
        option: The flag that names it, as "data_path (prefix)".
        weight: As given before the prefix, or None.
    """

    prefix: str
    documents: int
    tokens: int
    split_documents: tuple[int, int, int]
    split_tokens: tuple[int, int, int]
    option: str
    weight: float | None


@dataclass(frozen=True)
class DataSummary:
    """The checked data sets, in the order they were named.

    Attributes:
        datasets: One each.
        unseen: Prefixes in object storage, not looked at.
    """

    datasets: tuple[DatasetSummary, ...]
    unseen: tuple[str, ...] = ()

    @property
    def prefixes(self) -> list[str]:
        """Of all the data sets that were looked at."""
        return [dataset.prefix for dataset in self.datasets]

    @property
    def documents(self) -> int:
        """Documents of all the data sets."""
        return sum(dataset.documents for dataset in self.datasets)

    @property
    def tokens(self) -> int:
        """Tokens of all the data sets."""
        return sum(dataset.tokens for dataset in self.datasets)

    def shares(self, split: str) -> list[Share]:
        """Returns what each data set gives to a split ("train", "valid" or "test")."""
        index = SPLITS.index(split)
        return [
            Share(dataset.option, dataset.prefix, dataset.weight, dataset.split_tokens[index])
            for dataset in self.datasets
            if dataset.split_documents[index] > 0
        ]


def check_data_options(options: Mapping[str, Any], vocab_size: int) -> DataSummary:
    """Checks the data of a training run.

    Args:
        options: Megatron's validated arguments, name -> value.
        vocab_size: The tokenizer's, before padding.

    Raises:
        ValueError: "option (value) must ... What to do."
    """
    paths = read_data_paths(options)
    check_validation_sets(options)
    return check_training_data(
        split=options["split"],
        vocab_size=vocab_size,
        per_dataset_sequences_path=options["per_dataset_sequences_path"],
        **paths,  # type: ignore[arg-type]
    )


def describe_data(
    summary: DataSummary, samples: Sequence[int | None], options: Mapping[str, Any]
) -> list[str]:
    """Returns lines that state the data and how often the run repeats them.

    Args:
        summary: From `check_data_options`.
        samples: Samples of train, valid and test that the run asks for; None is one epoch.
        options: Megatron's validated arguments, name -> value.

    Raises:
        ValueError: If the data cannot serve so many samples.
    """
    lines = [f"> data: {summary.documents:,} documents, {summary.tokens:,} tokens"]
    if summary.unseen:
        return [*lines, "> data in object storage: samples and cached indices are not checked"]
    return lines + check_plan(
        {split: summary.shares(split) for split in SPLITS},
        samples,
        options["seq_length"],
        skip_train=options["skip_train"],
        stops_at_end=options["dataloader_type"] == "single",
    )


def check_training_data(
    data_path: Sequence[str] | None,
    split: str | None = None,
    vocab_size: int | None = None,
    *,
    train_data_path: Sequence[str] | None = None,
    valid_data_path: Sequence[str] | None = None,
    test_data_path: Sequence[str] | None = None,
    per_dataset_sequences_path: str | None = None,
    scan_tokens: int = SCAN_TOKENS,
) -> DataSummary:
    """Checks everything that `--data-path` or the per-split paths name.

    Costs the reading of each index, and of up to `scan_tokens` tokens of each data set for the
    largest id: run it in one process. Data in object storage is not looked at. Do not call it with
    `--mock-data`.

    Args:
        data_path: As given to --data-path: prefixes, or weights and prefixes in turn.
        split: As given to --split; None is Megatron's default. Used with `data_path` alone.
        vocab_size: The tokenizer's, before padding; None skips the checks against it.
        train_data_path: As given to --train-data-path, instead of `data_path`.
        valid_data_path: Likewise.
        test_data_path: Likewise.
        per_dataset_sequences_path: A JSON file, prefix -> [sequences, document boundaries], which
            Megatron takes for what the headers say.
        scan_tokens: Most tokens of each data set to look at; of a larger one, evenly spread blocks.

    Raises:
        ValueError: "option (value) must ... What to do."
    """
    per_split = (train_data_path, valid_data_path, test_data_path)
    if not data_path and not any(per_split):
        raise ValueError(
            "data_path (not given) must name at least one data set: the prefix of a .bin and "
            ".idx pair from tools/preprocess_data.py. For random tokens instead, pass "
            "--mock-data."
        )
    if data_path and any(per_split):
        raise ValueError(
            "data_path (given) must not be combined with train_data_path, valid_data_path or "
            "test_data_path. Choose one way."
        )
    if split is not None and any(per_split):
        raise ValueError(
            f"split ({split}) must not be given with data paths per split: each is one split as a "
            "whole. Leave --split out."
        )
    blends: list[tuple[str, Sequence[str], Sequence[tuple[float, float] | None]]] = []
    if data_path:
        shares = parse_split(split if split is not None else DEFAULT_SPLIT)
        blends.append(("data_path", data_path, shares))
    for index, paths in enumerate(per_split):
        if paths:
            whole = [(0.0, 1.0) if i == index else None for i in range(len(SPLITS))]
            blends.append((f"{SPLITS[index]}_data_path", paths, whole))
    summaries, unseen = [], []
    for name, values, parts in blends:
        for weight, prefix in _weighted(name, values):
            if prefix.startswith(OBJECT_STORAGE):
                unseen.append(prefix)
                continue
            data = _open_dataset(f"{name} ({prefix})", prefix)
            if per_dataset_sequences_path is not None:
                _check_sequences(per_dataset_sequences_path, data, vocab_size)
            summaries.append(_check_dataset(name, weight, data, parts, vocab_size, scan_tokens))
    return DataSummary(tuple(summaries), tuple(unseen))


def _weighted(option: str, values: Sequence[str]) -> list[tuple[float | None, str]]:
    prefixes = parse_blend(option, values)
    if len(prefixes) == len(values):
        return [(None, prefix) for prefix in prefixes]
    weights = [float(value) for value in values[::2]]
    for weight, prefix in zip(weights, prefixes, strict=True):
        if weight == 0:
            raise ValueError(
                f"{option} ({' '.join(values)}) must have weights above 0: {prefix} has 0, and "
                "Megatron does not start. Leave it out."
            )
    return list(zip(weights, prefixes, strict=True))


def _check_sequences(path: str, data: IndexedFile, vocab_size: int | None) -> None:
    option = f"per_dataset_sequences_path ({path})"
    given = read_json("per_dataset_sequences_path", path).get(data.prefix, "nothing")
    there = [len(data), len(data.boundaries)]
    if given != there:
        raise ValueError(
            f"{option} must give {there} for {data.prefix}, its sequences and document "
            f"boundaries; it gives {given}. Make the file again."
        )
    # GPTDatasetConfig (0.19.2): with this file, the dtype is guessed from the vocabulary.
    guess = "<i4" if vocab_size is not None and vocab_size > 1 << 16 else "<u2"
    if vocab_size is not None and data.dtype != np.dtype(guess):
        raise ValueError(
            f"{option} must not be given: Megatron would read the {data.dtype.name} tokens as "
            f"{np.dtype(guess).name}, by the vocabulary ({vocab_size}). Leave "
            "--per-dataset-sequences-path out."
        )


def _open_dataset(option: str, prefix: str) -> IndexedFile:
    try:
        return IndexedFile(prefix)
    except ValueError as error:
        meant = sorted(glob.glob(f"{glob.escape(prefix)}_*_document.idx"))
        hint = f" Did you mean {meant[0].removesuffix('.idx')}?" if meant else ""
        raise ValueError(f"{option} must be a complete data set: {error}{hint}") from None
    except OSError as error:
        raise ValueError(f"{option} must be readable: {error}") from None


def _check_dataset(
    name: str,
    weight: float | None,
    data: IndexedFile,
    shares: Sequence[tuple[float, float] | None],
    vocab_size: int | None,
    scan_tokens: int,
) -> DatasetSummary:
    option = f"{name} ({data.prefix})"
    if len(data) == 0 or data.tokens.size == 0:
        raise ValueError(
            f"{option} must hold at least one document with a token; it has {data.documents} "
            f"documents and {data.tokens.size} tokens. Make it again with "
            "tools/preprocess_data.py."
        )
    if data.dtype.kind not in "iu":
        raise ValueError(
            f"{option} must hold integer tokens, not {data.dtype.name}. Choose another."
        )
    _check_tokens(option, data, vocab_size, scan_tokens)
    ranges = split_documents(shares, len(data))
    tokens = [
        0 if bounds is None else int(np.sum(data.lengths[slice(*bounds)], dtype=np.int64))
        for bounds in ranges
    ]
    for which, bounds, share, count in zip(SPLITS, ranges, shares, tokens, strict=True):
        if bounds is not None and share is not None and count == 0:
            needed = documents_needed(shares)
            raise ValueError(
                f"{option} must give the {which} split a document: --split gives it "
                f"{share[1] - share[0]:.4g} of {len(data)} documents, which comes to none, and "
                f"Megatron would wait for ever. Use at least {needed} documents, or another "
                f"--split (weight 0 turns {which} off)."
            )
    return DatasetSummary(
        data.prefix,
        len(data),
        int(data.tokens.size),
        tuple(0 if b is None else b[1] - b[0] for b in ranges),  # type: ignore[arg-type]
        tuple(tokens),  # type: ignore[arg-type]
        option,
        weight,
    )


def _check_tokens(option: str, data: IndexedFile, vocab_size: int | None, scan_tokens: int) -> None:
    if vocab_size is None:
        return
    if data.dtype == np.dtype("<u2") and vocab_size > np.iinfo(np.uint16).max + 1:
        raise ValueError(
            f"{option} holds uint16 tokens, but the tokenizer has {vocab_size} pieces: it cannot "
            "have been made with this tokenizer. Tokenize again with it, or train with the one "
            "the data was made with."
        )
    smallest, largest = _token_range(option, data, scan_tokens)
    if smallest < 0 or largest >= vocab_size:
        bad = smallest if smallest < 0 else largest
        raise ValueError(
            f"{option} must hold tokens below the tokenizer's vocabulary ({vocab_size}); it has "
            f"the token {bad}. Tokenize again with this tokenizer, or train with the one the data "
            "was made with."
        )


def _token_range(option: str, data: IndexedFile, scan_tokens: int) -> tuple[int, int]:
    size = data.tokens.size
    blocks = range(0, size, SCAN_BLOCK)
    allowed = max(1, scan_tokens // SCAN_BLOCK)
    if len(blocks) > allowed:
        blocks = blocks[:: math.ceil(len(blocks) / allowed)]
    elif find_manifest(data.prefix) is not None:
        # Every token is looked at anyway: a byte that changed since it was written shows too.
        try:
            found = verify_dataset(data)
        except ValueError as error:
            raise ValueError(
                f"{option} must be what its manifest describes: {error} If it was replaced on "
                "purpose, remove the manifest."
            ) from None
        return found.smallest_token or 0, found.largest_token or 0
    smallest, largest = 0, 0
    for begin in blocks:
        block = data.tokens[begin : begin + SCAN_BLOCK]
        smallest, largest = min(smallest, int(block.min())), max(largest, int(block.max()))
    return smallest, largest
