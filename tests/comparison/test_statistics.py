"""What may be said of differences between variants."""

import numpy as np
import pytest

from megatron_satformer.comparison.statistics import (
    bootstrap_interval,
    compare,
    conclude,
    noise_rate,
)


def test_differences_are_paired_by_seed():
    """What a seed does to both is no difference between them."""
    one, other = {1: 5.0, 2: 6.0, 3: 7.0}, {3: 7.1, 2: 6.1, 1: 5.1}
    found = compare(one, other)
    assert found.mean == pytest.approx(-0.1)
    assert (found.low, found.high) == pytest.approx((-0.1, -0.1))
    assert found.verdict == "lower"
    assert compare(other, one).verdict == "higher"


def test_no_difference_shown_is_a_result():
    found = compare({1: 1.0, 2: 2.0, 3: 3.0}, {1: 1.1, 2: 1.9, 3: 3.1})
    assert found.low < 0 < found.high
    assert found.verdict == "no difference shown"
    told = conclude("a", "b", "text, validation loss", found)
    assert told.startswith("a - b, text, validation loss: no difference shown, -0.0333 (95% ")


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_or_two_seeds_show_nothing(seeds):
    one = dict.fromkeys(range(seeds), 1.0)
    found = compare(one, dict.fromkeys(range(seeds), 2.0))
    assert found.mean == -1
    assert found.verdict == "too few seeds"


def test_only_common_seeds_count():
    assert compare({1: 1.0, 2: 5.0}, {1: 3.0, 7: 0.0}).mean == -2
    with pytest.raises(ValueError, match="must have a seed in common"):
        compare({1: 1.0}, {2: 1.0})


def test_few_values_have_all_their_resamples():
    """Three of them: 27 equally likely means; the 2.5th percentile lies between the first two."""
    low, high = bootstrap_interval(np.array([0.0, 3.0, 9.0]))
    assert 0 < low < 1
    assert 7 < high < 9
    means = sorted((a + b + c) / 3 for a in (0, 3, 9) for b in (0, 3, 9) for c in (0, 3, 9))
    assert low == pytest.approx(np.percentile(means, 2.5))


def test_interval_covers_as_often_as_it_says():
    """Of 10 normal values: bootstrap intervals of so few cover a little less."""
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval(draw.normal(1.0, 1.0, size=10))
        hits += low <= 1.0 <= high
    assert 0.85 <= hits / 200 <= 0.97


def test_noise_rate():
    assert noise_rate(3) == 0.25
    assert noise_rate(5) == 0.0625
