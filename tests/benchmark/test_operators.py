"""Where the time of a step goes: the operator that a step has more is the one that is named."""

import torch

from megatron_satformer.benchmark.operators import largest_differences, seconds_by_operator


def test_the_operator_that_takes_longer_is_found():
    x = torch.randn(512, 512)
    first, mine = seconds_by_operator(
        [lambda: x.tanh(), lambda: x.tanh() @ x @ x @ x], torch.device("cpu")
    )
    (found,) = largest_differences(mine, first, 1)
    assert found["name"] == "aten::mm"
    assert found["ms"] == found["more_ms"] == mine["aten::mm"] * 1e3 > 0
    assert "aten::mm" not in first


def test_what_is_less_counts_and_the_baseline_has_its_largest():
    first, mine = {"a": 3.0, "b": 1.0, "c": 2.0}, {"a": 1.0, "b": 1.5, "d": 0.1}
    assert [(x["name"], x["more_ms"]) for x in largest_differences(mine, first, 3)] == [
        ("a", -2000.0),
        ("c", -2000.0),
        ("b", 500.0),
    ]
    assert [x["name"] for x in largest_differences(first, first, 2)] == ["a", "c"]
