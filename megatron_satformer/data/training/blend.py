"""Megatron's rules for `--data-path` and `--split`, on plain values.

Source: megatron/core/datasets of 0.19.2: utils.get_blend_from_list,
blended_megatron_dataset_config.parse_and_normalize_split and convert_split_vector_to_split_matrix,
BlendedMegatronDatasetBuilder._build_megatron_dataset_splits.
"""

import math
import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from megatron_satformer.data.datasets.indexed import check_prefix

SPLITS = ("train", "valid", "test")
# What Megatron's parser takes for --split where --data-path is given without it.
DEFAULT_SPLIT = "969, 30, 1"
# Up to here the number of documents that a split needs is searched for one by one.
MOST_DOCUMENTS = 1 << 24


def parse_blend(option: str, values: Sequence[str]) -> list[str]:
    """Returns the prefixes of a blend: the values, or every second one if weights come before.

    Raises:
        ValueError: If the weights are mixed up with prefixes, negative, not finite, or all zero.
    """
    prefixes = [value.strip() for value in values]
    if len(values) % 2 == 0:
        weights = [_as_float(value) for value in values[::2]]
        if any(weight is not None for weight in weights):
            numbers = [weight for weight in weights if weight is not None]
            if len(numbers) < len(weights):
                raise ValueError(
                    f"{option} ({' '.join(values)}) must be prefixes alone, or a weight before "
                    "every prefix."
                )
            if any(not math.isfinite(w) or w < 0 for w in numbers) or sum(numbers) <= 0:
                raise ValueError(
                    f"{option} ({' '.join(values)}) must have weights that are not negative, and "
                    "not all 0."
                )
            prefixes = prefixes[1::2]
    for prefix in prefixes:
        check_prefix(option, prefix)
    return prefixes


def _as_float(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def parse_split(split: str) -> list[tuple[float, float] | None]:
    """Returns the share of the documents, from and to, of train, valid and test; None for weight 0.

    The arithmetic is Megatron's to the last bit, so that rounding to documents agrees.

    Raises:
        ValueError: If it is not one to three numbers, not negative and not all 0.
    """
    # Megatron takes whatever looks like a number, and -5 for 5; here what is between must be plain.
    parts = [part for part in re.split(r"[,;:/\s]+", split) if part]
    plain = all(re.fullmatch(r"\d+\.?\d*|\.\d+", part, re.ASCII) for part in parts)
    weights = [float(part) for part in parts] if plain else []
    if len(weights) > len(SPLITS) or sum(weights) <= 0:
        raise ValueError(
            f"split ({split}) must be up to three numbers, train,valid,test, none negative and "
            "not all 0. For example 98,1,1."
        )
    vector = np.array(weights + [0.0] * (len(SPLITS) - len(weights)), dtype=np.float64)
    normalized = (vector / np.sum(vector)).tolist()
    ends = list(accumulate(normalized, initial=0))
    return [(begin, end) if end > begin else None for begin, end in pairwise(ends)]


def split_documents(
    shares: Sequence[tuple[float, float] | None], documents: int
) -> list[tuple[int, int] | None]:
    """Returns the documents, from and to (exclusive), that Megatron gives to each split."""
    return [
        None
        if share is None
        else (round(share[0] * float(documents)), round(share[1] * float(documents)))
        for share in shares
    ]


def documents_needed(shares: Sequence[tuple[float, float] | None]) -> int:
    """Returns a number of documents from which on no split stays empty.

    It is the smallest such number, unless that is above MOST_DOCUMENTS. A smaller one may do by the
    luck of rounding while a larger one does not.
    """
    positive = [share for share in shares if share is not None]
    # A share that comes to more than one document cannot round to none.
    safe = math.floor(1 / min(end - begin for begin, end in positive)) + 2
    if safe > MOST_DOCUMENTS:
        return safe
    counts = np.arange(safe, dtype=np.float64)
    filled = np.ones(safe, dtype=bool)
    for begin, end in positive:
        filled &= np.round(end * counts) > np.round(begin * counts)
    return int(np.flatnonzero(~filled)[-1]) + 1
