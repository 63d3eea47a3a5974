"""Claims on made-up gates of which it is known what is true."""

import numpy as np
import pytest

from megatron_satformer.analysis.gates.claims import judge, judge_claims
from tests.analysis.gates.measured import build_measured

SPARSE, DEEPER, HEADS, RETRIEVAL = range(4)


def gates(zeros=0.3, layers=(1.0, 1.0, 1.0), heads=(1.0, 1.0), level=1.0, sequences=40, seed=0):
    """Relu-like gates; each sequence has a level of its own, as texts do."""
    rng = np.random.default_rng(seed)
    scale = np.outer(layers, heads) * level
    own = rng.uniform(0.8, 1.2, (sequences, 1, 1, 1))
    drawn = rng.uniform(0.5, 1.5, (sequences, 32, *scale.shape)) * scale * own
    return np.where(rng.random(drawn.shape) < zeros, 0.0, drawn).astype(np.float32)


@pytest.mark.parametrize(
    ("claim", "made", "verdict"),
    [
        (SPARSE, {"zeros": 0.7}, "supported"),
        (SPARSE, {"zeros": 0.3}, "not supported"),
        (SPARSE, {"zeros": 0.5}, "undecided"),
        (SPARSE, {"zeros": 0.7, "sequences": 7}, "undecided"),
        (DEEPER, {"layers": (1.0, 1.2, 1.4)}, "supported"),
        (DEEPER, {"layers": (1.4, 1.2, 1.0)}, "not supported"),
        (DEEPER, {"layers": (1.0, 1.0, 1.0)}, "undecided"),
        (DEEPER, {"layers": (1.0,)}, "undecided"),
        (HEADS, {"heads": (1.0, 2.0)}, "supported"),
        (HEADS, {"heads": (1.0, 1.02)}, "not supported"),
        (HEADS, {"heads": (1.0,)}, "undecided"),
        (RETRIEVAL, {}, "undecided"),
    ],
    ids=str,
)
def test_verdicts(claim, made, verdict):
    found = judge_claims(build_measured(gates(**made)))[claim]
    assert found.verdict == verdict
    assert f": {verdict}" in found.sentence


@pytest.mark.parametrize(
    ("level", "verdict"), [(1.5, "supported"), (0.7, "not supported"), (1.0, "undecided")]
)
def test_retrieval(level, verdict):
    found = judge_claims(build_measured(gates(), gates(level=level, seed=1)))[RETRIEVAL]
    assert found.verdict == verdict
    assert found.value == pytest.approx(0.7 * (level - 1), abs=0.05)
    assert found.low < found.value < found.high
    assert "before an answer less elsewhere in prompts" in found.sentence


def test_equal_heads_are_not_told_apart_by_noise():
    """Few sequences: the heads of the sample differ, and no more than noise makes them."""
    verdicts = [
        judge_claims(build_measured(gates(sequences=8, zeros=0.9, seed=seed)))[HEADS].verdict
        for seed in range(12)
    ]
    assert verdicts.count("supported") <= 1


def test_numbers():
    values = np.zeros((8, 4, 2, 2), np.float32)
    values[:, :, 1] = [1.0, 3.0]
    sparse, deeper, heads, _ = judge_claims(build_measured(values))
    assert (sparse.value, sparse.low, sparse.high) == (0.5, 0.5, 0.5)
    assert sparse.verdict == "not supported"
    assert "2 of 4 heads are 0 at every token" in sparse.sentence
    assert deeper.value == 2.0
    assert heads.value == pytest.approx(np.sqrt(2) / 2 / 2)  # the other layer's heads are alike


def test_the_rule():
    assert judge(0.51, 0.6, 0.5, 100) == "supported"
    assert judge(0.4, 0.5, 0.5, 100) == "not supported"
    assert judge(0.4, 0.6, 0.5, 100) == "undecided"
    assert judge(np.nan, np.nan, 0.5, 100) == "undecided"
