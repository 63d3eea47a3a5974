"""What was claimed of gates, each judged by an interval and nothing else.

A claim says that a number is above a line. Its 95% interval (bootstrap over sequences) above the
line: supported; at or below it: not supported; on both sides, or too few sequences: undecided.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_satformer.analysis.gates.effects import difference, over_cells, over_columns
from megatron_satformer.analysis.gates.measure import ANSWERING, ELSEWHERE, TEXT, Measured
from megatron_satformer.analysis.gates.sums import FEWEST, find_interval

APART = 0.1  # standard deviation over heads, in shares of their mean


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        name: What is claimed.
        number: What it is judged by, in words.
        value: The number; None where there is none.
        low, high: Its interval.
        line: What it has to be above.
        verdict: supported, not supported or undecided.
        note: What else belongs to it.
    """

    name: str
    number: str
    value: float | None
    low: float | None
    high: float | None
    line: float
    verdict: str
    note: str = ""

    @property
    def sentence(self) -> str:
        """All of it in a line."""
        told = f"{self.name}: {self.verdict}"
        if self.value is not None:
            interval = f"[{self.low:.4g}, {self.high:.4g}]"
            told += f"; {self.number} is {self.value:.4g} {interval}, the line {self.line:g}"
        return f"{told}{'; ' + self.note if self.note else ''}."


def judge(low: float, high: float, line: float, sequences: int) -> str:
    """The verdict on an interval."""
    if sequences < FEWEST or not (np.isfinite(low) and np.isfinite(high)):
        return "undecided"
    if low > line:
        return "supported"
    return "not supported" if high <= line else "undecided"


def _claim(
    name: str, number: str, resampled: npt.NDArray, line: float, sequences: int, note: str = ""
) -> Claim:
    low, high = find_interval(resampled[1:])
    verdict = judge(low, high, line, sequences)
    if sequences < FEWEST:
        note = f"{note}{', ' if note else ''}{sequences} sequences are too few"
    return Claim(name, number, float(resampled[0]), low, high, line, verdict, note)


def judge_claims(measured: Measured) -> list[Claim]:
    """The four claims on gates."""
    return [
        _judge_sparse(measured),
        _judge_deeper(measured),
        _judge_heads(measured),
        _judge_retrieval(measured),
    ]


def _judge_sparse(measured: Measured) -> Claim:
    present = measured.grid.present.numpy()
    shares = over_cells(measured.zeros.means()[:, 0], present)
    dead = int(((measured.cells.zeros == measured.tokens) & present).sum())
    note = f"{measured.grid.zeros_at_start:g} at initialisation, {dead} of {present.sum()} heads "
    return _claim(
        "the gates are sparse",
        "the share of gates that are exactly 0",
        shares,
        0.5,
        measured.zeros.sequences,
        f"{note}are 0 at every token",
    )


def _openings(measured: Measured) -> npt.NDArray:
    """Mean absolute alpha of text, [N + 1, R, C]."""
    return measured.sizes.means()[:, measured.names.index(("all", TEXT))]


def _judge_deeper(measured: Measured) -> Claim:
    name, number = "deeper layers open more", "the slope of mean |alpha| over layers"
    layers = np.array([layer or 0 for layer in measured.grid.layers], float)
    if len(layers) < 2:
        return Claim(name, number, None, None, None, 0.0, "undecided", "one layer has gates")
    rows = over_columns(_openings(measured), measured.grid.present.numpy())
    around = layers - layers.mean()
    slopes = (rows @ around) / (around @ around)
    told = ", ".join(f"{mean:.3g}" for mean in rows[0])
    note = f"by layer {told}"
    return _claim(name, number, slopes, 0.0, measured.zeros.sequences, note)


def _judge_heads(measured: Measured) -> Claim:
    """Sampling noise makes equal heads differ: its variance is taken off, twice off resamples."""
    name = "heads differ"
    number = "the standard deviation of mean |alpha| over a layer's heads, in shares of their mean"
    if len(measured.grid.columns) < 2:
        return Claim(name, number, None, None, None, APART, "undecided", "a layer has one head")
    means = _openings(measured)
    noise = means[1:].var(0, ddof=1).mean(-1)  # [R]
    spread = means.var(-1, ddof=1)  # [N + 1, R]
    spread[0] -= noise
    spread[1:] -= 2 * noise
    level = means.mean(-1)
    apart = np.sqrt(np.maximum(0.0, spread))
    shares = np.divide(apart, level, out=np.zeros_like(apart), where=level > 0).mean(-1)
    return _claim(name, number, shares, APART, measured.zeros.sequences)


def _judge_retrieval(measured: Measured) -> Claim:
    name = "retrieval opens more"
    number = "mean |alpha| of retrieval prompts less that of text"
    tasks = [k for k, (group, task) in enumerate(measured.names) if group == "task"]
    if not tasks:
        return Claim(name, number, None, None, None, 0.0, "undecided", "no --retrieval was given")
    sums, counts = measured.sizes.sums, measured.sizes.counts
    present = measured.grid.present.numpy()
    text, prompts = tasks[0], tasks[1:]
    there = over_cells(sums[:, prompts].sum(1), present) / counts[:, prompts].sum(1)
    here = over_cells(sums[:, text], present) / counts[:, text]
    answers = difference(measured, "prompts", ANSWERING)
    low, high = find_interval(answers[1:])
    note = f"{ANSWERING} less {ELSEWHERE} {answers[0]:.4g} [{low:.4g}, {high:.4g}]"
    asked = measured.sizes.sequences - measured.zeros.sequences
    fewest = min(measured.zeros.sequences, asked)
    return _claim(name, number, there - here, 0.0, fewest, note)
