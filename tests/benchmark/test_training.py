"""The benchmark of training counts what is kept to the byte; its times are of this machine."""

import pytest

from megatron_satformer.benchmark.fresh_process import measure_in_own_process
from megatron_satformer.benchmark.training import BenchmarkOptions, format_table, run_benchmark


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, r"processes \(0\) must be at least 1"),
        ({"rounds": 0}, r"rounds \(0\) must be at least 1"),
        ({"operators": -1}, r"operators \(-1\) must be at least 0"),
        ({"architectures": ("former",)}, r"architectures \(former\) must be of transformer, "),
        ({"num_query_groups": 3}, r"num_attention_heads \(4\) must be a multiple of"),
    ],
)
def test_what_cannot_be_measured_is_told(options, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkOptions(**options)


@pytest.mark.slow
def test_a_step_and_its_parts():
    """A control beside the plain one: bytes to the byte, parts of the step, operators of each."""
    options = BenchmarkOptions(
        ("transformer", "satformer-softmax", "satformer"),
        hidden_size=64,
        num_layers=3,
        seq_length=32,
        micro_batch_size=2,
        vocab_size=64,
        rounds=2,
        steps=1,
        operators=3,
        device="cpu",
    )
    figures = measure_in_own_process(run_benchmark, options)
    assert figures["optimizer"] == "Megatron's FP32Optimizer over torch.optim.adamw.AdamW"
    plain, control, ours = figures["measured"]
    rows = 2 * 16 + 64  # gate rows of two layers, padded, and one V1
    assert (ours["saved_mib"] - plain["saved_mib"]) * 2**20 == 4 * 32 * 2 * rows
    for row in (control, ours):
        low, high = row["optimizer_spread"]
        assert low <= row["optimizer_ratio"] <= high
        assert row["optimizer_ms"] > 0
        more = [abs(entry["more_ms"]) for entry in row["operators"]]
        assert len(more) == 3
        assert more == sorted(more, reverse=True)
    assert {"aten::mm"} <= {entry["name"] for entry in plain["operators"]}
    table = format_table(figures)
    assert "saved MiB" in table
    assert "ms of a step more than transformer's" in table
