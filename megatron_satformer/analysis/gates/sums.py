"""What is kept of a stream of tokens; its size does not grow with their number.

Intervals come from a bootstrap over sequences, since the tokens of one are not independent: each
resample counts every sequence a Poisson number of times, which needs no second look at it.

Shapes: N resamples, K categories, b batch, s sequence, R rows, C columns.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

RESAMPLES = 200
CONFIDENCE = 0.95
FEWEST = 8  # sequences: the resamples of fewer are no guide
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
PER_OCTAVE = 16  # bins of the histogram: a quantile is right within 2.2%
LOWEST, HIGHEST = -16, 12  # powers of 2; what is smaller counts as 0
SIDE = PER_OCTAVE * (HIGHEST - LOWEST)
HIGHEST_TOKENS = 5


def draw_weights(rng: np.random.Generator, sequences: int) -> npt.NDArray:
    """How often each resample counts each sequence; the first is the sample itself, [N + 1, b]."""
    weights = rng.poisson(1.0, (RESAMPLES + 1, sequences)).astype(np.float64)
    weights[0] = 1.0
    return weights


def find_interval(resampled: npt.NDArray) -> tuple[float, float]:
    """The middle 95% of resamples, [N]."""
    outside = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(resampled, [outside, 100 - outside])
    return float(low), float(high)


class ResampledSums:
    """Sums over tokens by category, of the sample and of every resample.

    Attributes:
        sums: [N + 1, K, R, C].
        counts: Tokens. [N + 1, K]
        sequences: That have been added.
        met: Sequences with a token of each category. [K]
    """

    def __init__(self, categories: int, rows: int, columns: int) -> None:
        self.sums = np.zeros((RESAMPLES + 1, categories, rows, columns))
        self.counts = np.zeros((RESAMPLES + 1, categories))
        self.sequences = 0
        self.met = np.zeros(categories, np.int64)

    def add(self, weights: npt.NDArray, member: npt.NDArray, values: npt.NDArray) -> None:
        """Adds sequences.

        Args:
            weights: From `draw_weights`. [N + 1, b]
            member: Whether a token is in a category. [b, K, s]
            values: [b, s, R, C].
        """
        flat = values.reshape(*values.shape[:2], -1)
        each = member.astype(np.float32) @ flat.astype(np.float32)  # [b, K, R C]
        size = self.sums.shape
        self.sums += (weights @ each.reshape(len(each), -1)).reshape(size)
        self.counts += weights @ member.sum(-1)
        self.sequences += len(values)
        self.met += member.any(-1).sum(0)

    def means(self) -> npt.NDArray:
        """[N + 1, K, R, C]; NaN where a category has no token."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.sums / self.counts[:, :, None, None]


class Cells:
    """Moments and histograms of the values of every row and column."""

    def __init__(self, rows: int, columns: int) -> None:
        self.shape = rows, columns
        self.tokens = 0
        self.sum, self.squares, self.absolute, self.logs, self.zeros = np.zeros((5, rows, columns))
        self.histogram = np.zeros((rows * columns, 2 * SIDE + 1), np.int64)

    def add(self, values: npt.NDArray) -> None:
        """Adds values of tokens, [tokens, R, C]."""
        wide, size = values.astype(np.float64), np.abs(values.astype(np.float64))
        self.tokens += len(values)
        self.sum += wide.sum(0)
        self.squares += (wide * wide).sum(0)
        self.absolute += size.sum(0)
        self.zeros += (size == 0).sum(0)
        with np.errstate(divide="ignore"):
            logs = np.log2(size)
        self.logs += (size * np.where(size > 0, logs, 0.0)).sum(0) * np.log(2)
        above = np.floor(np.clip(logs - LOWEST, -1.0, HIGHEST - LOWEST - 1e-9) * PER_OCTAVE)
        above = np.where(logs < LOWEST, 0, above + 1)  # 1 .. SIDE; 0 is 0
        bins = (SIDE + np.sign(wide) * above).astype(np.int64).reshape(len(values), -1)
        bins += np.arange(bins.shape[1]) * self.histogram.shape[1]
        counted = np.bincount(bins.ravel(), minlength=self.histogram.size)
        self.histogram += counted.reshape(self.histogram.shape)

    def mean(self) -> npt.NDArray:
        """[R, C]."""
        return self.sum / self.tokens

    def deviation(self) -> npt.NDArray:
        """Standard deviation, [R, C]."""
        return np.sqrt(np.maximum(0.0, self.squares / self.tokens - self.mean() ** 2))

    def entropy(self) -> npt.NDArray:
        """Of each token's share in the sum of absolute values, nats; log(tokens) if all are alike.

        [R, C]; 0 where all values are 0.
        """
        total = np.where(self.absolute > 0, self.absolute, 1.0)
        return np.maximum(0.0, np.log(total) - self.logs / total)

    def quantiles(self) -> dict[float, npt.NDArray]:
        """[R, C] each."""
        below = np.cumsum(self.histogram, axis=1)
        found = {}
        for share in QUANTILES:
            wanted = max(1, int(np.ceil(share * self.tokens)))
            bins = (below < wanted).sum(1) - SIDE
            size = 2.0 ** (LOWEST + (np.abs(bins) - 0.5) / PER_OCTAVE)
            found[share] = np.where(bins == 0, 0.0, np.sign(bins) * size).reshape(self.shape)
        return found


class HighestTokens:
    """The tokens of the highest values of every row and column, each token once."""

    def __init__(self, rows: int, columns: int) -> None:
        self._kept: list[list[tuple[float, int, dict]]] = [[] for _ in range(rows * columns)]
        self._columns = columns

    def add(
        self, ids: npt.NDArray, values: npt.NDArray, describe: Callable[[int, int], dict]
    ) -> None:
        """Adds values.

        Args:
            ids: [b, s].
            values: [b, s, R, C].
            describe: Sequence and place of a token -> what is kept of it.
        """
        flat, tokens = values.reshape(ids.size, -1), ids.ravel()
        most = min(ids.size, 4 * HIGHEST_TOKENS)
        best = np.argpartition(-flat, most - 1, axis=0)[:most]  # [most, R C]
        for cell, kept in enumerate(self._kept):
            places = best[:, cell]
            for place in places[np.lexsort((places, -flat[places, cell]))]:
                value, token = float(flat[place, cell]), int(tokens[place])
                if value <= 0 or (len(kept) == HIGHEST_TOKENS and value <= kept[-1][0]):
                    break
                if any(other == token and had >= value for had, other, _ in kept):
                    continue
                told = describe(*divmod(int(place), ids.shape[1]))
                others = [one for one in kept if one[1] != token]
                kept[:] = sorted([*others, (value, token, told)], key=lambda one: -one[0])
                del kept[HIGHEST_TOKENS:]

    def best(self, row: int, column: int) -> list[dict]:
        """What was kept of the highest, from the highest on, with their values."""
        kept = self._kept[row * self._columns + column]
        return [{"value": value, **told} for value, _, told in kept]
