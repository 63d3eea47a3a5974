"""How much further some tokens open the gates than others, with intervals over sequences."""

from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_satformer.analysis.gates.measure import TEXT, Measured
from megatron_satformer.analysis.gates.sums import FEWEST, find_interval

WHOLE = "task"  # its categories are compared with text, those of other groups with their rest


def over_cells(values: npt.NDArray, present: npt.NDArray) -> npt.NDArray:
    """The mean over the cells that there are, [..., R, C] -> [...]."""
    return (values * present).sum((-2, -1)) / present.sum()


def over_columns(values: npt.NDArray, present: npt.NDArray) -> npt.NDArray:
    """The mean over the cells of each row, [..., R, C] -> [..., R]."""
    return (values * present).sum(-1) / present.sum(-1)


def difference(measured: Measured, group: str, name: str) -> npt.NDArray:
    """Mean over cells of a category less that of the tokens it is compared with.

    [N + 1], NaN where either has no token.
    """
    sums, counts = measured.sizes.sums, measured.sizes.counts
    own = measured.names.index((group, name))
    against = [
        k
        for k, (other, category) in enumerate(measured.names)
        if other == group and k != own and (group != WHOLE or category == TEXT)
    ]
    present = measured.grid.present.numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        here = over_cells(sums[:, own], present) / counts[:, own]
        there = over_cells(sums[:, against].sum(1), present) / counts[:, against].sum(1)
        return here - there


def build_effects(measured: Measured) -> list[dict[str, Any]]:
    """One entry for each category that has tokens.

    An effect is the difference of means over the standard deviation of a token in a cell. There is
    no interval where fewer than `FEWEST` sequences have such a token.
    """
    present = measured.grid.present.numpy()
    variance = measured.cells.squares / measured.tokens
    variance = variance - (measured.cells.absolute / measured.tokens) ** 2
    deviation = float(np.sqrt(np.maximum(0.0, over_cells(variance, present))))
    means, table = measured.sizes.means()[0], []
    for k, (group, name) in enumerate(measured.names):
        count = measured.sizes.counts[0, k]
        if not count or group == "all":
            continue
        entry = {
            "group": group,
            "category": name,
            "tokens": int(count),
            "sequences": int(measured.sizes.met[k]),
            "mean": float(over_cells(means[k], present)),
            "by_row": over_columns(means[k], present).tolist(),
        }
        differences = difference(measured, group, name)
        if np.isfinite(differences[0]) and (group, name) != (WHOLE, TEXT):
            found = {"difference": float(differences[0])}
            if entry["sequences"] >= FEWEST:
                found["low"], found["high"] = find_interval(differences[1:])
            entry |= found
            if deviation:
                entry["effect"] = {what: x / deviation for what, x in found.items()}
        table.append(entry)
    return table
