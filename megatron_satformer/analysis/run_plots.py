"""Runs on top of each other, from their metrics.jsonl."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from megatron_satformer.analysis.plots import DOTS_PER_INCH
from megatron_satformer.files.atomic import AtomicFile
from megatron_satformer.files.metrics_file import read_metrics

METRICS = "metrics.jsonl"
X_AXES = ("step", "tokens", "samples", "hours")
VALIDATION = "validation"


def plot_runs(
    runs: Sequence[str],
    save: str,
    metric: str = "lm_loss",
    x: str = "step",
    log_scale: bool = False,
) -> dict[str, int]:
    """Draws one figure of each run's metric, and of its validation where that has the metric.

    Args:
        runs: Folders of runs, or files; NAME=PATH gives a curve another name than its folder's.
        save: PNG file to write.
        metric: Name of a value in the files.
        x: Axis: step, tokens, samples, or hours of training.
        log_scale: Whether the metric's axis is logarithmic.

    Returns:
        Curve -> points drawn.

    Raises:
        ValueError: If a run has no file, or none of it has the metric.
    """
    found = [_open(run) for run in runs]
    for name, count in itertools.groupby(sorted(name for name, _, _ in found)):
        if len(list(count)) > 1:
            raise ValueError(
                f"runs ({name}) must have names of their own. Give them: A=PATH B=PATH."
            )
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    drawn = {}
    for name, path, records in found:
        color = None
        steps_and_xs = _positions(records, x)
        for split, style in (("train", "-"), (VALIDATION, "o--")):
            points = [
                (np.interp(record["step"], *steps_and_xs), record[metric])
                for record in records
                if record["split"] == split and isinstance(record.get(metric), int | float)
            ]
            if points:
                label = name if split == "train" else f"{name}, {split}"
                (line,) = axes.plot(*zip(*points, strict=True), style, color=color, label=label)
                color = line.get_color()
                drawn[label] = len(points)
        if color is None:
            plt.close(figure)
            raise ValueError(
                f"metric ({metric}) must be a number that {path} has. It has "
                f"{', '.join(_numbers(records)) or 'none'}."
            )
    axes.set_xlabel(x)
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend()
    if log_scale:
        axes.set_yscale("log")
    with AtomicFile(Path(save)) as output:
        figure.savefig(output.file, dpi=DOTS_PER_INCH, format="png")
    plt.close(figure)
    return drawn


def _open(run: str) -> tuple[str, Path, list[dict[str, Any]]]:
    name, given, place = run.rpartition("=")
    path = Path(place)
    if path.is_dir():
        path /= METRICS
    if not path.is_file():
        raise ValueError(
            f"runs ({run}) must be folders of --save or --tensorboard-dir that hold {METRICS}, or "
            "such files. Mend the path."
        )
    # A run's folder is often called checkpoints; then the one above it says more.
    parts = [part for part in path.absolute().parts[:-1] if part != "checkpoints"]
    return name if given else parts[-1], path, read_metrics(path)


def _positions(records: list[dict[str, Any]], x: str) -> tuple[list[int], list[float]]:
    """Steps, and where they lie on the axis; what was evaluated between two lies between them."""
    trained = [record for record in records if record["split"] == "train"]
    steps = [record["step"] for record in trained]
    if x == "step":
        steps = [record["step"] for record in records]
        return steps, list(map(float, steps))
    if x != "hours":
        return steps, [record[x] for record in trained]
    hours = (
        (stop - start) * record["seconds_per_step"] / 3600
        for (start, stop), record in zip(itertools.pairwise([0, *steps]), trained, strict=True)
    )
    return steps, list(itertools.accumulate(hours))


def _numbers(records: list[dict[str, Any]]) -> list[str]:
    return sorted(
        {
            name
            for record in records
            for name, value in record.items()
            if isinstance(value, int | float) and math.isfinite(value) and name not in X_AXES
        }
    )
