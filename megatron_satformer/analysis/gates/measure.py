"""Forward passes over text and retrieval prompts, whose weights and losses are added up.

Shapes: b batch, s sequence, R rows, C columns, K categories.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_satformer.analysis.gates.access import Grid, watched
from megatron_satformer.analysis.gates.categories import (
    FIFTHS,
    GROUPS,
    TokenTexts,
    categorize,
)
from megatron_satformer.analysis.gates.sums import (
    Cells,
    HighestTokens,
    ResampledSums,
    draw_weights,
)
from megatron_satformer.analysis.retrieval.accuracy import TestSet, encode_examples

AT_ONCE = 2048  # tokens of a pass, and positions whose logits are held
AROUND = 8  # tokens of context on either side
SEED = 1234
TEXT, ANSWERING, ELSEWHERE = "text", "before an answer", "elsewhere in prompts"


@torch.inference_mode()
def find_losses(model: Any, ids: Tensor) -> npt.NDArray:
    """The loss of every token in nats, NaN of the first of a sequence, in one pass.

    Args:
        model: From `as_packaged`.
        ids: [b, s].
    """
    ids = ids.to(model.device)
    hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    labels = ids[:, 1:].flatten()
    losses = [
        torch.nn.functional.cross_entropy(model.lm_head(h).float(), label, reduction="none")
        for h, label in zip(hidden.split(AT_ONCE), labels.split(AT_ONCE), strict=True)
    ]
    found = np.full(tuple(ids.shape), np.nan)
    found[:, 1:] = torch.cat(losses).view(len(ids), -1).double().cpu().numpy()
    return found


def batches(tokens: npt.NDArray, seq_length: int, most: int) -> Iterator[Tensor]:
    """Whole sequences of a text, one behind the other, as ids [b, s].

    Args:
        tokens: Documents end to end. [tokens]
        seq_length: Tokens of a sequence.
        most: Tokens to read.
    """
    count = min(tokens.size, most) // seq_length
    size = max(1, AT_ONCE // seq_length)
    for first in range(0, count, size):
        rows = tokens[first * seq_length : min(count, first + size) * seq_length]
        yield torch.from_numpy(rows.astype(np.int64)).view(-1, seq_length)


@dataclass(frozen=True)
class Baseline:
    """What the model does with the first tokens, for comparison.

    Attributes:
        ids: The batches.
        losses: Mean of each sequence. [sequences]
        edges: What divides the losses of tokens into fifths. [4]
        means: Of every point, its mean weights over tokens.
    """

    ids: list[Tensor]
    losses: npt.NDArray
    edges: npt.NDArray
    means: list[Tensor]


def find_baseline(model: Any, grid: Grid, ids: list[Tensor]) -> Baseline:
    """Reads batches of ids, at least one."""
    losses, sums = [], [torch.zeros(()) for _ in grid.points]
    with watched(grid) as take:
        for rows in ids:
            losses.append(find_losses(model, rows))
            _, raw = take(tuple(rows.shape))
            for n, weights in enumerate(raw):
                own = weights.flatten(0, 1) if weights.dim() > 2 else weights.unsqueeze(0)
                sums[n] = sums[n] + own.mean(0) * len(rows)
    count = sum(map(len, ids))
    every = np.concatenate(losses)
    edges = np.nanquantile(every, np.arange(1, FIFTHS) / FIFTHS)
    return Baseline(ids, np.nanmean(every, axis=1), edges, [total / count for total in sums])


class Measured:
    """What was seen of a model's weights.

    Attributes:
        names: Group and category, of every category.
        sizes: Absolute values by category.
        zeros: Exact zeros of text, as one category.
        cells: Of text.
        highest: Of text.
        texts: Of tokens.
    """

    def __init__(self, grid: Grid, tokenizer: Any, tasks: Sequence[str]) -> None:
        shape = len(grid.rows), len(grid.columns)
        self.grid = grid
        groups = {"all": (TEXT,), **GROUPS}
        if tasks:
            groups |= {"task": (TEXT, *tasks), "prompts": (ANSWERING, ELSEWHERE)}
        self.names = [(group, name) for group, names in groups.items() for name in names]
        self.sizes = ResampledSums(len(self.names), *shape)
        self.zeros = ResampledSums(1, *shape)
        self.cells = Cells(*shape)
        self.highest = HighestTokens(*shape)
        self.texts = TokenTexts(tokenizer)
        self._rng = np.random.default_rng(SEED)

    @property
    def tokens(self) -> int:
        """Of text."""
        return self.cells.tokens

    def add_text(
        self, ids: npt.NDArray, values: npt.NDArray, categories: dict[str, npt.NDArray]
    ) -> None:
        """Adds sequences of text.

        Args:
            ids: [b, s].
            values: [b, s, R, C].
            categories: From `categorize`.
        """
        everywhere = np.ones(ids.shape, bool)
        fixed = {("all", TEXT): everywhere, ("task", TEXT): everywhere}
        member = np.stack(
            [
                fixed.get((group, name), np.zeros(ids.shape, bool))
                if group not in GROUPS
                else categories[group] == GROUPS[group].index(name)
                for group, name in self.names
            ],
            axis=1,
        )
        weights = draw_weights(self._rng, len(ids))
        self.sizes.add(weights, member, np.abs(values))
        self.zeros.add(weights, everywhere[:, None], values == 0)
        self.cells.add(values.reshape(-1, *values.shape[2:]))

        def describe(row: int, place: int) -> dict:
            first = max(0, place - AROUND)
            shown = self.texts.shown(ids[row, first : place + 1 + AROUND].tolist())
            here = place - first
            return {
                "token": shown[here],
                "before": "".join(shown[:here]),
                "after": "".join(shown[here + 1 :]),
            }

        self.highest.add(ids, np.abs(values), describe)

    def add_prompts(
        self, task: str, values: npt.NDArray, lengths: npt.NDArray, answering: npt.NDArray
    ) -> None:
        """Adds prompts of a task.

        Args:
            task: Its name.
            values: [b, s, R, C].
            lengths: Tokens of each. [b]
            answering: Whether a token stands before one of an answer. [b, s]
        """
        inside = np.arange(values.shape[1]) < lengths[:, None]
        chosen = {
            ("task", task): inside,
            ("prompts", ANSWERING): inside & answering,
            ("prompts", ELSEWHERE): inside & ~answering,
        }
        nowhere = np.zeros_like(inside)
        member = np.stack([chosen.get(name, nowhere) for name in self.names], axis=1)
        self.sizes.add(draw_weights(self._rng, len(values)), member, np.abs(values))


def read_text(
    model: Any,
    measured: Measured,
    ids: Iterator[Tensor],
    frequencies: npt.NDArray,
    edges: npt.NDArray,
    tell: Callable[[str], None],
) -> None:
    """Reads text into sums.

    Args:
        model: From `as_packaged`.
        measured: Where to add it.
        ids: Batches [b, s].
        frequencies: From `find_frequencies`.
        edges: Of losses, see `Baseline`.
        tell: Prints a line.
    """
    with watched(measured.grid) as take:
        for rows in ids:
            losses = find_losses(model, rows)
            values, _ = take(tuple(rows.shape))
            own = rows.numpy()
            kinds = categorize(own, measured.texts, frequencies, losses, edges)
            measured.add_text(own, values.numpy(), kinds)
    tell(f"read {measured.tokens} tokens of text")


@torch.inference_mode()
def read_prompts(
    model: Any,
    tokenizer: Any,
    measured: Measured,
    sets: Sequence[TestSet],
    limit: int,
    tell: Callable[[str], None],
) -> None:
    """Reads the prompts of retrieval tasks, answers included, into sums.

    Args:
        model: From `as_packaged`.
        tokenizer: Its tokenizer, a fast one.
        measured: Where to add them.
        sets: From `find_test_sets`.
        limit: Examples of each.
        tell: Prints a line.
    """
    with watched(measured.grid) as take:
        for one in sets:
            examples = list(one.examples(limit))
            size = max(1, AT_ONCE // one.length)
            for first in range(0, len(examples), size):
                encoded = encode_examples(model, tokenizer, examples[first : first + size])
                model.model(encoded.ids.to(model.device), use_cache=False)
                values, _ = take(tuple(encoded.ids.shape))
                answering = np.zeros(tuple(encoded.ids.shape), bool)
                for row, place, _ in encoded.spans:
                    answering[row, place.start - 1 : place.stop - 1] = True
                lengths = np.array(encoded.lengths)
                measured.add_prompts(one.task, values.numpy(), lengths, answering)
            tell(f"read {len(examples)} prompts of {one.task}, {one.length} tokens each")
