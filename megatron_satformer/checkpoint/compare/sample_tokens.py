"""The tokens that two models read when they are compared, and where they come from.

Must not know: models.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_satformer.data.datasets.indexed import IndexedFile
from megatron_satformer.data.training.blend import (
    DEFAULT_SPLIT,
    parse_blend,
    parse_split,
    split_documents,
)
from megatron_satformer.data.training.data_paths import read_data_paths

VERIFY_TEXT = Path(__file__).with_name("verify_text.txt")
# Where a checkpoint's args name its data; older or partial ones lack some.
DATA_OPTIONS: dict[str, Any] = dict.fromkeys(
    (
        *("data_path", "train_data_path", "valid_data_path", "test_data_path"),
        *("data_args_path", "per_split_data_args_path", "split"),
    )
)


@dataclass(frozen=True)
class SampleTokens:
    """What both models read.

    Attributes:
        ids: Token ids, [b, s].
        source: Where they are from, for people.
    """

    ids: Tensor
    source: str


def draw_tokens(vocab_size: int, sequences: int, seq_length: int, seed: int) -> SampleTokens:
    """Random ids, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (sequences, seq_length), generator=generator)
    return SampleTokens(ids, f"random tokens (seed {seed})")


def encode_text(
    text: str,
    source: str,
    encode: Callable[[str], Sequence[int]],
    sequences: int,
    seq_length: int,
    fewer: bool = False,
) -> SampleTokens:
    """The first tokens of a text.

    Args:
        text: To encode.
        source: Its name.
        encode: Text -> ids.
        sequences: Wanted.
        seq_length: Tokens of each.
        fewer: Whether a short text may give fewer sequences, or one that is shorter.

    Raises:
        ValueError: If the text is too short; says what it is long enough for.
    """
    ids = torch.tensor(list(encode(text)), dtype=torch.long)
    wanted = sequences * seq_length
    if len(ids) < wanted and not fewer:
        raise ValueError(
            f"{source} has {len(ids)} tokens, and {sequences} x {seq_length} are wanted. Pass a "
            "longer text, or smaller --sequences and --seq-length."
        )
    length = max(1, min(seq_length, len(ids)))
    rows = min(sequences, len(ids) // length)
    if rows == 0:
        raise ValueError(f"{source} has no tokens. Pass another text.")
    return SampleTokens(ids[: rows * length].view(rows, length), source)


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: If it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text ({file}) must be a readable UTF-8 file: {error}.") from None


def read_validation_tokens(
    args: Namespace, vocab_size: int, sequences: int, seq_length: int
) -> SampleTokens:
    """Tokens spread over the validation data of a checkpoint's run.

    Args:
        args: Of the checkpoint.
        vocab_size: Ids must be below.
        sequences: Wanted; from each data set of a blend in turn.
        seq_length: Tokens of each.

    Raises:
        ValueError: If the run had none, or they cannot be read on this machine.
    """
    options = DATA_OPTIONS | {k: v for k, v in vars(args).items() if k in DATA_OPTIONS}
    paths = read_data_paths(options)
    apart = paths["valid_data_path"]
    named = apart or paths["data_path"]
    if not named:
        raise ValueError("data_path (none): the checkpoint names no data files.")
    prefixes = parse_blend("valid_data_path" if apart else "data_path", named)[:sequences]
    split = "0,1,0" if apart else options["split"] or DEFAULT_SPLIT
    rows = []
    for number, prefix in enumerate(prefixes):
        count = len(range(number, sequences, len(prefixes)))
        rows += _spread(_validation_part(prefix, split), count, seq_length)
    ids = torch.from_numpy(np.stack(rows).astype(np.int64))
    if ids.max() >= vocab_size or ids.min() < 0:
        raise ValueError(f"data_path ({prefixes[0]}) holds ids that the model has no row for.")
    more = f" and {len(prefixes) - 1} more" if len(prefixes) > 1 else ""
    return SampleTokens(ids, f"validation data {Path(prefixes[0]).name}{more}")


def _validation_part(prefix: str, split: str) -> npt.NDArray:
    """The tokens of the validation documents of one data set."""
    file = IndexedFile(prefix)
    part = split_documents(parse_split(split), len(file))[1]
    if part is None:
        raise ValueError(f"split ({split}) has no validation data.")
    before = file.lengths[: part[0]].sum(dtype=np.int64)
    after = before + file.lengths[part[0] : part[1]].sum(dtype=np.int64)
    return file.tokens[before:after]


def _spread(tokens: npt.NDArray, rows: int, length: int) -> list[npt.NDArray]:
    """Rows of `length` tokens, none overlapping, from all over."""
    if len(tokens) < rows * length:
        raise ValueError(f"the validation data have {len(tokens)} tokens, not {rows * length}.")
    stride = len(tokens) // rows
    return [tokens[row * stride : row * stride + length] for row in range(rows)]
