"""The benchmark of training counts what is kept to the byte; its times are of this machine."""

from dataclasses import replace

import pytest

from megatron_satformer.benchmark.fresh_process import measure_in_own_process
from megatron_satformer.benchmark.training import BenchmarkOptions, format_table, run_benchmark


def test_no_process_measures_nothing():
    with pytest.raises(ValueError, match=r"processes \(0\) must be at least 1"):
        BenchmarkOptions(processes=0)


@pytest.mark.slow
def test_bytes_kept_for_backward():
    options = BenchmarkOptions(hidden_size=64, num_layers=3, seq_length=32, micro_batch_size=2)
    options = replace(options, vocab_size=64, rounds=1, steps=1, device="cpu")
    figures = measure_in_own_process(run_benchmark, options)
    plain, ours = figures["measured"]
    rows = 2 * 16 + 64  # gate rows of two layers, padded, and one V1
    assert (ours["saved_mib"] - plain["saved_mib"]) * 2**20 == 4 * 32 * 2 * rows
    assert "saved MiB" in format_table(figures)
