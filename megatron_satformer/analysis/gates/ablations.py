"""What loss and retrieval become without a layer's gates, a head's, all, or the tokens' say."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megatron_satformer.analysis.gates.access import Grid, changed
from megatron_satformer.analysis.gates.measure import AT_ONCE, SEED, Baseline, find_losses
from megatron_satformer.analysis.gates.sums import draw_weights, find_interval
from megatron_satformer.analysis.retrieval.accuracy import TestSet, answer
from megatron_satformer.checkpoint.exported.modeling_access import LearnedAccess

Changes = dict[LearnedAccess, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Ablation:
    """One change of the model.

    Attributes:
        kind: "closed", or "at the mean" of each weight over tokens.
        row: Where; None for everywhere.
        column: Which head; None for all.
        changes: Of weights, for `changed`.
    """

    kind: str
    row: str | None
    column: str | None
    changes: Changes


def list_ablations(grid: Grid, means: Sequence[Tensor]) -> Iterator[Ablation]:
    """Everything at once, each row, and of gates each head.

    Args:
        grid: Of the model.
        means: Of every point, see `Baseline`.
    """
    own = [[n for n, p in enumerate(grid.points) if p.row == r] for r in range(len(grid.rows))]
    moving = {n for n, point in enumerate(grid.points) if not point.static}

    def close(points: Sequence[int], head: int | None = None) -> Changes:
        return {grid.points[n].module: partial(_close, head) for n in points}

    def average(points: Sequence[int]) -> Changes:
        return {grid.points[n].module: partial(_set, means[n]) for n in points if n in moving}

    every = range(len(grid.points))
    if grid.gate:
        yield Ablation("closed", None, None, close(every))
        for row, points in zip(grid.rows, own, strict=True):
            yield Ablation("closed", row, None, close(points))
            for head, column in enumerate(grid.columns):
                yield Ablation("closed", row, column, close(points, head))
    if moving:
        yield Ablation("at the mean", None, None, average(every))
        for row, points in zip(grid.rows, own, strict=True):
            if moving & set(points):
                yield Ablation("at the mean", row, None, average(points))


def _set(mean: Tensor, weights: Tensor) -> Tensor:
    return mean.to(weights).expand_as(weights)


def _close(head: int | None, weights: Tensor) -> Tensor:
    closed = weights.clone()
    closed[..., slice(None) if head is None else head, :] = 0
    return closed


def find_right(
    model: Any, tokenizer: Any, sets: Sequence[TestSet], limit: int
) -> dict[str, npt.NDArray]:
    """Task -> the share of right answers of every example.

    Args:
        model: From `as_packaged`.
        tokenizer: Its tokenizer, a fast one.
        sets: From `find_test_sets`.
        limit: Examples of each.
    """
    found: dict[str, list[float]] = {}
    for one in sets:
        examples = list(one.examples(limit))
        size = max(1, AT_ONCE // one.length)
        for first in range(0, len(examples), size):
            some = examples[first : first + size]
            answers = iter(answer(model, tokenizer, some))
            for example in some:
                right = [next(answers).right for _ in example.depths]
                found.setdefault(one.task, []).append(float(np.mean(right)))
    return {task: np.array(shares) for task, shares in found.items()}


def _paired(after: npt.NDArray, before: npt.NDArray) -> dict[str, float]:
    """The mean difference, with its interval over sequences."""
    weights = draw_weights(np.random.default_rng(SEED), len(after))
    means = (weights @ (after - before)) / np.maximum(1.0, weights.sum(1))
    low, high = find_interval(means[1:])
    return {"difference": float(means[0]), "low": low, "high": high}


def run_ablations(
    model: Any,
    tokenizer: Any,
    grid: Grid,
    baseline: Baseline,
    sets: Sequence[TestSet],
    limit: int,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Every ablation, against the model as it is.

    Args:
        model: From `as_packaged`.
        tokenizer: Its tokenizer.
        grid: Of the model.
        baseline: What it does as it is, and the text.
        sets: Retrieval tasks, if any.
        limit: Examples of each.
        tell: Prints a line.

    Returns:
        The loss as it is, exact match by task, and of each ablation what changes.
    """
    right = find_right(model, tokenizer, sets, limit)
    ablations = list(list_ablations(grid, baseline.means))
    results = []
    for number, one in enumerate(ablations, 1):
        with changed(one.changes):
            losses = [np.nanmean(find_losses(model, ids), axis=1) for ids in baseline.ids]
            now = find_right(model, tokenizer, sets, limit)
        result: dict[str, Any] = {"kind": one.kind, "row": one.row, "column": one.column}
        result["loss"] = _paired(np.concatenate(losses), baseline.losses)
        result["exact_match"] = {task: _paired(now[task], right[task]) for task in right}
        results.append(result)
        if number % 10 == 0 or number == len(ablations):
            tell(f"{number} of {len(ablations)} ablations")
    return {
        "loss": float(baseline.losses.mean()),
        "tokens": int(sum(ids.numel() for ids in baseline.ids)),
        "exact_match": {task: float(shares.mean()) for task, shares in right.items()},
        "changes": results,
    }
