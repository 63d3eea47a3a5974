"""The yardstick of a first run: what a model knows that only counts tokens."""

import os

import numpy as np
import numpy.typing as npt

from megatron_satformer.data.datasets.indexed import IndexedFile
from megatron_satformer.data.training.blend import SPLITS, parse_split, split_documents


def read_splits(prefix: str | os.PathLike[str], split: str) -> dict[str, npt.NDArray]:
    """Returns the tokens of "train", "valid" and "test" of a data set, as training splits it.

    Args:
        prefix: Path of the data set without `.bin`.
        split: As given to --split.

    Returns:
        Memory-mapped token ids of each split, documents end to end. [tokens]

    Raises:
        ValueError: If the data set is damaged.
    """
    data = IndexedFile(prefix)
    starts = np.concatenate(([0], np.cumsum(data.lengths, dtype=np.int64)))
    ranges = split_documents(parse_split(split), len(data))
    return {
        name: data.tokens[slice(0, 0) if r is None else slice(starts[r[0]], starts[r[1]])]
        for name, r in zip(SPLITS, ranges, strict=True)
    }


def unigram_entropy(prefix: str | os.PathLike[str], split: str, vocab_size: int) -> float:
    """Returns the mean of -ln p(token) over the validation tokens, in nats per token.

    p is the share of the token among the training tokens, with 1 added to every count, so that a
    token that training never shows has a probability too.

    Args:
        prefix: Path of the data set without `.bin`.
        split: As given to --split.
        vocab_size: Number of ids.

    Raises:
        ValueError: If a split is empty.
    """
    splits = read_splits(prefix, split)
    for name in ("train", "valid"):
        if splits[name].size == 0:
            raise ValueError(f"split ({split}) must give the {name} split a document of {prefix}.")
    train, valid = (np.bincount(splits[name], minlength=vocab_size) for name in ("train", "valid"))
    log_p = np.log(train + 1.0) - np.log(train.sum() + train.size)
    return float(-(valid * log_p).sum() / valid.sum())
