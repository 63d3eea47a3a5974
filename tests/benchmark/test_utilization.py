"""Model FLOPs utilization: the count against torch's own, the peaks by the names of cards."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_satformer.benchmark.training import BenchmarkOptions
from megatron_satformer.benchmark.utilization import count_training_flops, peak_flops
from tests.models import build_twin


def test_flops_are_those_that_torch_counts():
    """Forward of the twin, GQA; torch counts attention in full, we the half that is causal."""
    shape = BenchmarkOptions(
        hidden_size=64,
        num_layers=3,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=96,
        seq_length=32,
        vocab_size=80,
    )
    twin = build_twin(
        "transformer",
        vocab_size=80,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(torch.zeros(1, 32, dtype=torch.int64))
    masked = 3 * 2 * 32 * 32 * 64  # layers, q k and p v, half of 2 s s h each
    assert counter.get_total_flops() - masked == 32 * count_training_flops(shape) / 3


@pytest.mark.parametrize(
    ("device", "flops"),
    [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA B200", 2250e12), ("T4", None)],
)
def test_peaks_are_found_by_name(device, flops):
    assert peak_flops(device) == flops
