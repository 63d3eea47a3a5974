"""Pictures of a comparison."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from megatron_satformer.files.atomic import AtomicFile

DOTS_PER_INCH = 100


def draw_all(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what the results have; PNG files in the folder.

    Args:
        results: as in results.json.
        folder: where they go.
    """
    made = []
    for task, found in results["tasks"].items():
        made.append(draw_curves(task, found, folder / f"loss_{task}.png"))
        if any("accuracy" in run for run in _runs(found)):
            made.append(draw_accuracy(task, found, folder / f"accuracy_{task}.png"))
        if any(run["dead"] for run in _runs(found)):
            made.append(draw_dead(task, found, folder / f"dead_{task}.png"))
        if results.get("cost"):
            made.append(draw_cost(task, found, results["cost"], folder / f"cost_{task}.png"))
    return made


def draw_curves(task: str, found: dict[str, Any], path: Path) -> Path:
    """Validation loss over steps: the mean of the seeds, and the range that they span."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for color, (name, variant) in zip(_colors(len(found)), found.items(), strict=True):
        _draw_band(axes, [run["validation"] for run in variant["seeds"].values()], name, color)
    axes.set_xlabel("training step")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title(f"{task}: mean and range of the seeds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    return _save(figure, path)


def draw_accuracy(task: str, found: dict[str, Any], path: Path) -> Path:
    """Share of right answers: a bar for the mean of the seeds, a dot for each."""
    figure, axes = plt.subplots(figsize=(1.5 + 0.55 * len(found), 4.5), layout="constrained")
    for place, variant in enumerate(found.values()):
        values = [run["accuracy"] for run in variant["seeds"].values()]
        axes.bar(place, np.mean(values), color="#8fb3d9")
        axes.plot([place] * len(values), values, "o", color="#b5402a", markersize=4)
    axes.set_xticks(range(len(found)), found, rotation=60, ha="right", fontsize=8)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of answers that are right")
    axes.set_title(f"{task}: mean of the seeds, and each")
    axes.grid(alpha=0.3, axis="y")
    return _save(figure, path)


def draw_dead(task: str, found: dict[str, Any], path: Path) -> Path:
    """KV heads per layer whose gate is 0 at every token of a step, over steps; mean and range."""
    gated = {
        name: [run["dead"] for run in variant["seeds"].values()]
        for name, variant in found.items()
        if all(run["dead"] for run in variant["seeds"].values())
    }
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for color, (name, curves) in zip(_colors(len(gated)), gated.items(), strict=True):
        _draw_band(axes, curves, name, color)
    axes.set_xlabel("training step")
    axes.set_ylabel("dead KV heads of a layer")
    axes.set_title(f"{task}: heads whose gate is 0 at all tokens of a step, mean and range")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    return _save(figure, path)


def draw_cost(task: str, found: dict[str, Any], cost: dict[str, Any], path: Path) -> Path:
    """Loss against step time over that of the first variant."""
    ratios = {row["architecture"]: row["step_time_ratio"] for row in cost["measured"]}
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for name, variant in found.items():
        losses = [run["loss"] for run in variant["seeds"].values()]
        middle, span = (
            np.mean(losses),
            [[np.mean(losses) - min(losses)], [max(losses) - np.mean(losses)]],
        )
        axes.errorbar(ratios[name], middle, yerr=span, fmt="o", capsize=3)
        axes.annotate(
            name, (ratios[name], middle), xytext=(5, 4), textcoords="offset points", fontsize=7
        )
    axes.set_xlabel(f"step time over that of {next(iter(found))}")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title(f"{task}: cost against loss, range of the seeds")
    axes.grid(alpha=0.3)
    return _save(figure, path)


def _draw_band(axes: Any, curves: list[list[list[float]]], name: str, color: Any) -> None:
    """Mean and range over steps of curves, each a list of [step, value]."""
    values = np.array(curves)  # [seeds, steps, 2]
    steps, values = values[0, :, 0], values[..., 1]
    axes.plot(steps, values.mean(0), color=color, label=name, linewidth=1.3)
    axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15)


def _runs(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [run for variant in found.values() for run in variant["seeds"].values()]


def _colors(count: int) -> np.ndarray:
    return mpl.colormaps["turbo"](np.linspace(0.05, 0.95, count))


def _save(figure: Any, path: Path) -> Path:
    with AtomicFile(path) as output:
        figure.savefig(output.file, dpi=DOTS_PER_INCH, format="png")
    plt.close(figure)
    return path
