"""What a `--data-path` blend will serve: weights, documents, tokens, samples, epochs, and a look.

The arithmetic is that of the check before training: blend.py and samples.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from megatron_satformer.data.datasets.indexed import IndexedFile
from megatron_satformer.data.training.blend import (
    DEFAULT_SPLIT,
    SPLITS,
    parse_split,
    split_documents,
)
from megatron_satformer.data.training.preflight import DataSummary, check_training_data
from megatron_satformer.data.training.samples import (
    check_samples,
    plan_samples,
    samples_per_epoch,
    serve_samples,
)


@dataclass(frozen=True)
class Serving:
    """What one data set gives to one split.

    Attributes:
        prefix: Its path without `.bin`.
        weight: As given, summed if the blend names it several times; None without weights.
        part: Its part of the split's samples, in [0, 1].
        documents: Documents of the split in it: what Megatron splits by, its sequences.
        tokens: Tokens of the split in it, per epoch.
        samples: Samples that it contributes; within 1 of what Megatron draws.
        epochs: How often its tokens are served.
    """

    prefix: str
    weight: float | None
    part: float
    documents: int
    tokens: int
    samples: int
    epochs: float


@dataclass(frozen=True)
class SplitReport:
    """One split: its name, the samples wanted (None: one epoch of all), and what serves them."""

    split: str
    wanted: int | None
    servings: tuple[Serving, ...]


@dataclass(frozen=True)
class Sample:
    """A document drawn from a blend: its data set, its sequence number and all its tokens."""

    prefix: str
    sequence: int
    tokens: npt.NDArray


def wanted_samples(
    train_iters: int | None,
    train_samples: int | None,
    global_batch_size: int | None,
    eval_iters: int | None,
    eval_interval: int | None,
) -> tuple[int | None, int | None, int | None]:
    """Returns the samples that training asks of train, valid and test; None where unknown.

    Raises:
        ValueError: If a number is below 1, or options are missing or contradict each other.
    """
    numbers = {
        "train_iters": train_iters,
        "train_samples": train_samples,
        "global_batch_size": global_batch_size,
        "eval_interval": eval_interval,
    }
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1. Leave it out if unknown.")
    if eval_iters is not None and eval_iters < 0:
        raise ValueError(f"eval_iters ({eval_iters}) must not be negative. 0 evaluates nothing.")
    if train_iters is not None and train_samples is not None:
        raise ValueError(
            f"train_iters ({train_iters}) must not be combined with train_samples "
            f"({train_samples}). Choose one."
        )
    needs = {"train_iters": train_iters, "eval_iters": eval_iters, "eval_interval": eval_interval}
    if global_batch_size is None:
        for name, value in needs.items():
            if value is not None:
                raise ValueError(f"{name} ({value}) must come with global_batch_size. Pass it.")
        return train_samples, None, None
    if train_iters is None and train_samples is None:
        raise ValueError(
            f"global_batch_size ({global_batch_size}) must come with train_iters or train_samples. "
            "Pass one of them."
        )
    return plan_samples(
        train_iters=train_iters,
        train_samples=train_samples,
        global_batch_size=global_batch_size,
        # Megatron's default.
        eval_iters=100 if eval_iters is None else eval_iters,
        eval_interval=eval_interval,
    )


def report_blend(
    data_path: Sequence[str],
    split: str | None,
    seq_length: int,
    wanted: Sequence[int | None],
) -> list[SplitReport]:
    """Returns what a blend serves, for each split that has data.

    Args:
        data_path: As given to --data-path.
        split: As given to --split; None is Megatron's default.
        seq_length: Tokens per sample.
        wanted: Samples of train, valid and test; None is one epoch of everything.

    Raises:
        ValueError: Where training would refuse the data too.
    """
    if seq_length < 1:
        raise ValueError(f"seq_length ({seq_length}) must be at least 1. Pass the training's.")
    summary = check_training_data(data_path, split)
    if summary.unseen:
        raise ValueError(
            f"data_path ({summary.unseen[0]}) must be a local file: object storage is not read "
            "here. Copy the .idx and .bin."
        )
    reports = []
    for name, samples in zip(SPLITS, wanted, strict=True):
        shares = summary.shares(name)
        if shares:
            if samples is None:
                # One epoch of data with weights is a question here; in training it has no answer.
                shares = [replace(share, weight=None) for share in shares]
            check_samples(name, samples, shares, seq_length)
            reports.append(SplitReport(name, samples, _serve(summary, name, samples, seq_length)))
    return reports


def _serve(
    summary: DataSummary, split: str, samples: int | None, seq_length: int
) -> tuple[Serving, ...]:
    shares, index = summary.shares(split), SPLITS.index(split)
    served = serve_samples(samples, shares, seq_length)
    weighted = shares[0].weight is not None
    sizes = dict.fromkeys((one.prefix for one in served), 0.0)
    for share in shares:
        there = samples_per_epoch(share.tokens, seq_length)
        sizes[share.prefix] += there if share.weight is None else share.weight
    total = sum(sizes.values())
    datasets = {dataset.prefix: dataset for dataset in summary.datasets}
    return tuple(
        Serving(
            one.prefix,
            sizes[one.prefix] if weighted else None,
            sizes[one.prefix] / total if total else 0.0,
            datasets[one.prefix].split_documents[index],
            datasets[one.prefix].split_tokens[index],
            one.samples,
            one.epochs,
        )
        for one in served
    )


def draw_documents(report: SplitReport, split: str | None, count: int, seed: int) -> list[Sample]:
    """Draws documents: the data set by its part of the samples, in it each document alike.

    Args:
        report: The split to draw from.
        split: As given to `report_blend`.
        count: Documents to draw.
        seed: Of the draw; it has nothing to do with the order of training.

    Raises:
        ValueError: If `count` or `seed` is negative.
    """
    for name, value in (("show", count), ("seed", seed)):
        if value < 0:
            raise ValueError(f"{name} ({value}) must not be negative. Pass 0 or more.")
    rng = np.random.default_rng(seed)
    shares = parse_split(DEFAULT_SPLIT if split is None else split)
    parts = np.array([serving.part for serving in report.servings])
    drawn = []
    for chosen in rng.choice(len(parts), size=count, p=parts / parts.sum()):
        data = IndexedFile(report.servings[chosen].prefix)
        bounds = split_documents(shares, len(data))[SPLITS.index(report.split)]
        assert bounds is not None
        sequence = int(rng.integers(*bounds))
        drawn.append(Sample(data.prefix, sequence, data[sequence]))
    return drawn


def render_blend(reports: Sequence[SplitReport]) -> str:
    """Returns the report as text."""
    lines = []
    for report in reports:
        total = sum(serving.samples for serving in report.servings)
        what = "in one epoch of each" if report.wanted is None else f"of {report.wanted:,} wanted"
        lines.append(f"{report.split}: {total:,} samples {what}")
        lines.append(
            f"  {'weight':>9} {'part':>8} {'documents':>12} {'tokens':>16} {'samples':>13} "
            f"{'epochs':>8}"
        )
        for one in report.servings:
            weight = "-" if one.weight is None else f"{one.weight:g}"
            lines.append(
                f"  {weight:>9} {100 * one.part:>7.3f}% {one.documents:>12,} {one.tokens:>16,} "
                f"{one.samples:>13,} {one.epochs:>8.2f}  {one.prefix}"
            )
    return "\n".join(lines)
