"""Differences between categories, and intervals that know of sequences."""

import numpy as np
import pytest

from megatron_satformer.analysis.gates.effects import build_effects
from tests.analysis.gates.measured import build_measured


def test_differences_and_effect_sizes():
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, (30, 64))
    values = rng.uniform(0.5, 1.5, (30, 64, 2, 2)).astype(np.float32)
    values[kind == 1] += 0.25
    word = rng.integers(0, 2, (30, 64))
    measured = build_measured(values, kind=kind, word=word)
    table = {entry["category"]: entry for entry in build_effects(measured)}
    assert set(table) == {"punctuation", "digits", "word start", "word inside"}
    digits = table["digits"]
    assert digits["tokens"] == (kind == 1).sum()
    assert digits["mean"] == pytest.approx(values[kind == 1].mean(), rel=1e-5)
    expected = values[kind == 1].mean() - values[kind == 0].mean()
    assert digits["difference"] == pytest.approx(expected, abs=1e-5)
    assert digits["low"] < expected < digits["high"]
    assert digits["sequences"] == 30
    deviation = np.sqrt(values.reshape(-1, 4).var(0).mean())
    assert digits["effect"]["difference"] == pytest.approx(expected / deviation, rel=1e-3)
    assert table["punctuation"]["difference"] == pytest.approx(-expected, abs=1e-5)
    start = table["word start"]
    assert start["low"] < 0 < start["high"]
    assert digits["by_row"] == pytest.approx(values[kind == 1].mean((0, 2)).tolist(), rel=1e-5)


def test_few_sequences_have_no_interval():
    kind = np.zeros((30, 64), np.int64)
    kind[:7, 5] = 1
    values = np.random.default_rng(0).uniform(0, 1, (30, 64, 1, 1)).astype(np.float32)
    table = {e["category"]: e for e in build_effects(build_measured(values, kind=kind))}
    assert table["digits"]["sequences"] == 7
    assert "difference" in table["digits"]
    assert "low" not in table["digits"]
    assert "low" in table["punctuation"]


def test_tasks_are_compared_with_text():
    rng = np.random.default_rng(0)
    text, prompts = (rng.uniform(0, 1, (20, 16, 2, 2)).astype(np.float32) for _ in range(2))
    prompts[:, -2] += 2
    table = {e["category"]: e for e in build_effects(build_measured(text, prompts))}
    expected = prompts.mean() - text.mean()
    assert table["mqar"]["difference"] == pytest.approx(expected, abs=1e-5)
    assert "difference" not in table["text"]
    answering = prompts[:, -2].mean() - np.delete(prompts, -2, axis=1).mean()
    assert table["before an answer"]["difference"] == pytest.approx(answering, abs=1e-5)
    assert table["before an answer"]["low"] > 1.5
