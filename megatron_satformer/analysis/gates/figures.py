"""Heat maps of weights: layer by head or source, layer by category of token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt

DOTS_PER_INCH = 110
MOST_NUMBERS = 400


def draw_heat_map(
    path: Path,
    values: npt.NDArray,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    unit: str,
    across: str,
    signed: bool = False,
) -> None:
    """Draws one.

    Args:
        path: PNG file to write.
        values: NaN where there is nothing. [rows, columns]
        rows: Their names, layers.
        columns: Their names.
        title: Above it.
        unit: Of the values.
        across: What the columns are.
        signed: Whether colors part at 0.
    """
    long = max(map(len, columns), default=0) > 3
    width = 3.0 + (0.42 if len(columns) < 40 else 0.2) * len(columns)
    height = (2.8 if long else 1.9) + (0.32 if len(rows) < 40 else 0.2) * len(rows)
    figure, axes = plt.subplots(figsize=(max(5.0, width), height), layout="constrained")
    known = values[np.isfinite(values)]
    high = float(np.abs(known).max()) if known.size else 0.0
    limits = (-high, high) if signed else (0.0, high)
    colors = "RdBu_r" if signed else "viridis"
    image = axes.imshow(values, aspect="auto", cmap=colors, vmin=limits[0], vmax=limits[1] or 1e-6)
    axes.set_title(title, fontsize=10)
    axes.set_ylabel("layer")
    axes.set_xlabel(across)
    axes.set_xticks(range(len(columns)), labels=columns, rotation=90 if long else 0, fontsize=8)
    axes.set_yticks(range(len(rows)), labels=rows, fontsize=8)
    figure.colorbar(image, ax=axes, label=unit)
    if values.size <= MOST_NUMBERS:
        _write_numbers(axes, values, high, signed)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    plt.close(figure)


def _write_numbers(axes: Any, values: npt.NDArray, high: float, signed: bool) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            strong = abs(value) > 0.6 * high if signed else value < 0.5 * high
            color = "white" if strong else "black"
            told = f"{value:.2g}" if abs(value) < 10 else f"{value:.0f}"
            axes.text(column, row, told, ha="center", va="center", color=color, fontsize=7)
