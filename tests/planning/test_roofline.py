"""The roofline: bytes of operators by hand, FLOPs by the formulas that the README's stand on."""

import pytest
import torch

from megatron_satformer.benchmark.fresh_process import measure_in_own_process
from megatron_satformer.benchmark.utilization import count_training_flops
from megatron_satformer.model.architectures import PLAIN
from megatron_satformer.planning.hardware import find_gpu
from megatron_satformer.planning.roofline import (
    BenchmarkOptions,
    Traffic,
    format_table,
    run_benchmark,
)
from tests.parallel.layouts import DILATED, GATED


def test_an_operator_moves_what_it_reads_and_writes():
    gpu, a, b = find_gpu("h100"), torch.randn(8, 4), torch.randn(4, 6)
    with Traffic("h100") as traffic:
        out = a @ b
        product = traffic.take()
        out.t()[0, :3].copy_(torch.empty(3))  # 3 read, 3 written; views and room move nothing
        copied = traffic.take()
        b.new_ones(1, 1).expand(4, 6) + b  # one written, then one and 24 read, 24 written
        spread = traffic.take()
    assert (product.bytes, product.flops) == (4 * (32 + 24 + 48), 2 * 8 * 4 * 6)
    assert product.seconds == max(product.bytes / gpu.reads, product.flops / gpu.flops)
    assert (copied.bytes, spread.bytes) == (4 * 6, 4 * (1 + 1 + 24 + 24))


def test_bad_shapes_are_told():
    with pytest.raises(ValueError, match=r"num_layers \(1\) must be at least 2"):
        BenchmarkOptions(num_layers=1)
    with pytest.raises(ValueError, match=r"gpu \(v100\) must be one of"):
        BenchmarkOptions(gpu="v100")


@pytest.mark.slow
def test_flops_are_the_formulas_and_kernels_move_less():
    options = BenchmarkOptions(
        (PLAIN, *GATED, *DILATED),
        hidden_size=64,
        num_layers=4,
        num_attention_heads=4,
        num_query_groups=4,
        ffn_hidden_size=96,
        seq_length=32,
        vocab_size=80,
    )
    figures = measure_in_own_process(run_benchmark, options)
    plain, gated, dense = figures["computed"]
    layer = count_training_flops(options) - 6 * 64 * 80  # per token, and of all layers
    assert figures["layer"]["flops"] == 32 * layer / 4
    gates = 3 * 16 * 64 * 6 / 4  # of 4 rows, padded to 16, in 3 of 4 layers
    for way in ("torch", "kernels"):
        assert plain[way]["step_time_ratio"] == 1
        assert gated[way]["flops_more"] == pytest.approx(gates / (layer / 4))
    assert dense["kernels"]["bytes_more"] < dense["torch"]["bytes_more"] / 2
    assert "computed, not measured" in format_table(figures)
