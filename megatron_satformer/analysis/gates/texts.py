"""The texts that are shown token by token: a few that were held out, a prompt of each task."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_satformer.analysis.gates.access import Grid, watched
from megatron_satformer.analysis.gates.categories import TokenTexts
from megatron_satformer.analysis.gates.measure import find_losses
from megatron_satformer.analysis.gates.page import PageText
from megatron_satformer.analysis.retrieval.accuracy import TestSet, encode_examples

LONGEST = 256


def build_texts(
    model: Any, tokenizer: Any, grid: Grid, tokens: npt.NDArray, count: int, sets: Sequence[TestSet]
) -> list[PageText]:
    """Texts from evenly spread places of the held-out tokens, and one prompt of each task.

    Args:
        model: From `as_packaged`.
        tokenizer: Its tokenizer.
        grid: Of the model.
        tokens: Held out. [tokens]
        count: Texts.
        sets: Of tasks; the first of each is read.
    """
    texts = TokenTexts(tokenizer)
    size = min(LONGEST, tokens.size // max(1, count))
    shown = []
    with watched(grid) as take:

        def read(title: str, ids: Tensor) -> None:
            losses = find_losses(model, ids)[0]
            values = take((1, ids.shape[1]))[0][0].numpy().transpose(1, 2, 0).copy()
            values[~grid.present.numpy()] = np.nan
            told = [None if np.isnan(loss) else float(loss) for loss in losses]
            shown.append(PageText(title, texts.shown(ids[0].tolist()), values, told))

        for n in range(count):
            start = n * (tokens.size // count)
            ids = torch.from_numpy(tokens[start : start + size].astype(np.int64))
            read(f"held-out text, token {start}", ids.unsqueeze(0))
        for one in {one.task: one for one in reversed(sets)}.values():
            ids = encode_examples(model, tokenizer, list(one.examples(1))).ids
            read(f"{one.task}, {one.length} tokens", ids[:, -LONGEST:])
    return shown
