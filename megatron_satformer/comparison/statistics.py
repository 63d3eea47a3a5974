"""Paired differences, how sure they are, and what may be said of them.

Two variants are paired by seed: both saw the same tokens in the same order and began with the same
shared weights, so that what the seed does to both cancels.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
FEWEST = 3  # seeds: two differences of pure noise have one sign as often as not
RESAMPLES = 10_000  # where not all of them can be had
ALL_RESAMPLES = 50_000


@dataclass(frozen=True)
class Difference:
    """A metric of one variant less that of another, over their common seeds.

    Attributes:
        mean: of the seeds' differences.
        low, high: bootstrap interval of it, at `CONFIDENCE`; None with fewer than two seeds.
        seeds: how many there are.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def verdict(self) -> str:
        """`lower`, `higher`, `no difference shown`, or `too few seeds` to say."""
        if self.low is None or self.high is None or self.seeds < FEWEST:
            return "too few seeds"
        if self.high < 0:
            return "lower"
        return "higher" if self.low > 0 else "no difference shown"


def compare(one: Mapping[int, float], other: Mapping[int, float]) -> Difference:
    """The paired difference one - other.

    Args:
        one: seed -> metric.
        other: the same of the variant it is compared with.

    Raises:
        ValueError: they have no seed in common.
    """
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        raise ValueError("two variants must have a seed in common to be compared.")
    values = np.array([one[seed] - other[seed] for seed in seeds])
    if len(values) < 2:
        return Difference(float(values.mean()), None, None, len(values))
    low, high = bootstrap_interval(values)
    return Difference(float(values.mean()), low, high, len(values))


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Percentile interval of the mean over resamples of the values; all resamples if few.

    With three seeds there are 27 resamples and the interval is the range of the values: three
    differences of one sign show a difference, and one in four such triples of pure noise does so.
    """
    count = len(values)
    if count**count <= ALL_RESAMPLES:
        chosen = np.array(list(itertools.product(range(count), repeat=count)))
    else:
        chosen = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    outside = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values[chosen].mean(axis=1), [outside, 100 - outside])
    return float(low), float(high)


def noise_rate(seeds: int) -> float:
    """Share of differences of pure noise that are all of one sign, and so are taken for one."""
    return 2.0 * 0.5**seeds


def conclude(name: str, other: str, what: str, difference: Difference) -> str:
    """One sentence: who is lower in what, by how much, and how sure that is.

    Args:
        name: of the variant.
        other: of what it is compared with.
        what: the metric, as in "validation loss".
        difference: of the metric.
    """
    told = f"{difference.mean:+.4f}"
    if difference.low is None:
        return f"{name} - {other}, {what}: {told}, of one seed, which shows nothing."
    interval = f"[{difference.low:+.4f}, {difference.high:+.4f}]"
    sure = f"{CONFIDENCE:.0%} interval {interval}, {difference.seeds} seeds"
    return f"{name} - {other}, {what}: {difference.verdict}, {told} ({sure})."
