"""Loss masks on disk: beside the tokens `<prefix>.bin` lie, in `<prefix>_mask.bin`, as many flags.

The mask is an indexed data set of its own, one byte a token and the same documents: 1 where the
token is one to be learnt, an answer say, and 0 where it is given. Megatron's own tools read the
tokens without it. Must not know: Megatron's data sets, models.
"""

import os
from collections.abc import Iterable

import numpy as np

from megatron_satformer.data.datasets.indexed import IndexedFile, idx_path

ENDING = "_mask"
BLOCK = 1 << 24  # flags looked at in one go


def mask_prefix(prefix: str | os.PathLike[str]) -> str:
    """Returns the prefix of the mask of a data set."""
    return f"{os.fspath(prefix)}{ENDING}"


def has_mask(prefix: str | os.PathLike[str]) -> bool:
    """Whether a data set has a mask beside it."""
    return idx_path(mask_prefix(prefix)).is_file()


def check_masks(prefixes: Iterable[str], seq_length: int) -> list[str]:
    """Checks the masks of a run's data sets, for --use-loss-masks.

    Args:
        prefixes: Of every data set.
        seq_length: Tokens of a sample.

    Returns:
        Lines that say what is masked.

    Raises:
        ValueError: If none has a mask, one is not that of its tokens, or a sample would cut an
            example.
    """
    prefixes = list(dict.fromkeys(prefixes))
    masked = [prefix for prefix in prefixes if has_mask(prefix)]
    if not masked:
        raise ValueError(
            f"use_loss_masks (True) must come with a data set that has {ENDING}.bin and {ENDING}"
            f".idx beside it; {' '.join(prefixes) or 'the data'} has none. Make one with "
            "tools/make_retrieval_data.py, or leave --use-loss-masks out."
        )
    return [_check_mask(prefix, seq_length) for prefix in masked]


def describe_unused(prefixes: Iterable[str]) -> list[str]:
    """Returns a line for each data set whose mask a run without --use-loss-masks does not read."""
    return [
        f"WARNING: {prefix} has a loss mask beside it, and every token of it is trained on; for "
        "the marked ones alone pass --use-loss-masks"
        for prefix in dict.fromkeys(prefixes)
        if has_mask(prefix)
    ]


def _check_mask(prefix: str, seq_length: int) -> str:
    tokens, mask = IndexedFile(prefix), IndexedFile(mask_prefix(prefix))
    option = f"use_loss_masks ({mask.prefix})"
    if not np.array_equal(tokens.lengths, mask.lengths):
        raise ValueError(
            f"{option} must have the documents of {prefix}, token for token; it has {len(mask)} of "
            f"{mask.tokens.size} tokens and not {len(tokens)} of {tokens.tokens.size}. Make both "
            "again."
        )
    marked = 0
    for begin in range(0, mask.tokens.size, BLOCK):
        block = mask.tokens[begin : begin + BLOCK]
        if block.min() < 0 or block.max() > 1:
            raise ValueError(f"{option} must hold 0 and 1 alone; it holds {block.max()}.")
        marked += int(block.sum(dtype=np.int64))
    if not marked:
        raise ValueError(f"{option} must mark a token; it marks none. Make it again.")
    length = int(tokens.lengths[0])
    if (tokens.lengths != length).any():
        raise ValueError(
            f"{option} must be of documents of one length: samples would cut examples. Pad them."
        )
    if seq_length % length:
        raise ValueError(
            f"seq_length ({seq_length}) must be a multiple of {length}, the length of every "
            f"example of {prefix}: samples would cut examples. Use --seq-length {length}."
        )
    share = marked / mask.tokens.size
    return f"> loss mask: {marked:,} tokens of {prefix} count, {share:.2%}"
