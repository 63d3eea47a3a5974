"""Streamed sums are those of all values at once."""

import numpy as np
import pytest

from megatron_satformer.analysis.gates.sums import (
    HIGHEST_TOKENS,
    Cells,
    HighestTokens,
    ResampledSums,
    draw_weights,
    find_interval,
)


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((40, 50, 2, 3)) * [0.01, 1.0, 100.0]
    drawn[:, :, 1] = np.maximum(drawn[:, :, 1], 0)
    drawn[:, :, 1, 2] = 0
    return drawn.astype(np.float32)


def test_cells(values):
    cells = Cells(2, 3)
    for some in np.split(values, 8):
        cells.add(some.reshape(-1, 2, 3))
    flat = values.reshape(-1, 2, 3).astype(np.float64)
    np.testing.assert_allclose(cells.mean(), flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(cells.deviation(), flat.std(0), rtol=1e-9)
    assert np.array_equal(cells.zeros, (flat == 0).sum(0))
    for share, found in cells.quantiles().items():
        true = np.quantile(flat, share, axis=0, method="inverted_cdf")
        np.testing.assert_allclose(found, true, rtol=0.023, atol=2**-16)
    size = np.abs(flat)
    shares = size / np.where(size.sum(0) > 0, size.sum(0), 1)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(0)
    np.testing.assert_allclose(cells.entropy(), entropy, rtol=1e-9)
    same = Cells(1, 1)
    same.add(np.full((64, 1, 1), 0.3))
    assert same.entropy() == pytest.approx(np.log(64))


def test_sums_by_category_and_their_interval(values):
    rng = np.random.default_rng(0)
    member = rng.random((40, 2, 50)) < 0.5
    sums = ResampledSums(2, 2, 3)
    for some, inside in zip(np.split(values, 8), np.split(member, 8), strict=True):
        sums.add(draw_weights(rng, len(some)), inside, some)
    means = sums.means()
    for k in range(2):
        chosen = values[member[:, k]]
        np.testing.assert_allclose(means[0, k], chosen.mean(0), rtol=1e-4, atol=1e-5)
        low, high = find_interval(means[1:, k, 0, 1])
        expected = 2 * 1.96 / np.sqrt(len(chosen))  # the tokens here are independent
        assert expected * 0.75 < high - low < expected * 1.3
    assert sums.sequences == 40


def test_the_interval_is_that_of_sequences():
    """Sequences whose tokens are all alike: their number counts, not that of tokens."""
    rng = np.random.default_rng(1)
    levels = rng.standard_normal((200, 1, 1, 1))
    values = np.broadcast_to(levels, (200, 64, 1, 1))
    sums = ResampledSums(1, 1, 1)
    sums.add(draw_weights(rng, 200), np.ones((200, 1, 64), bool), values)
    low, high = find_interval(sums.means()[1:, 0, 0, 0])
    assert high - low == pytest.approx(2 * 1.96 * levels.std() / np.sqrt(200), rel=0.25)


def test_highest_tokens(values):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 30, (40, 50))
    highest = HighestTokens(2, 3)
    for some, tokens, first in zip(np.split(values, 8), np.split(ids, 8), range(8), strict=True):
        highest.add(tokens, some, lambda b, s, n=first: {"place": (5 * n + b, s)})
    for row, column in np.ndindex(2, 3):
        best = {}
        for (b, s), value in np.ndenumerate(values[:, :, row, column]):
            token = ids[b, s]
            if value > 0 and value > best.get(token, (0.0,))[0]:
                best[token] = float(value), (b, s)
        expected = sorted(best.values(), reverse=True)[:HIGHEST_TOKENS]
        assert [(one["value"], one["place"]) for one in highest.best(row, column)] == expected
    assert highest.best(1, 2) == []
