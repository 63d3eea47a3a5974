"""The benchmark of models that vLLM serves."""

import os

import pytest

from megatron_satformer.benchmark.serving import BenchmarkOptions, format_table, run_benchmark

VLLM = os.environ.get("TEST_VLLM_BIN", "")


def test_says_where_vllm_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"vllm \(.*\) must be a folder with the python"):
        BenchmarkOptions(vllm=str(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not VLLM, reason="TEST_VLLM_BIN names no environment: make test-vllm")
def test_models_take_turns():
    options = BenchmarkOptions(
        architectures=("satformer",),
        hidden_size=64,
        num_layers=2,
        num_attention_heads=2,
        num_query_groups=2,
        ffn_hidden_size=96,
        vocab_size=96,
        seq_length=16,
        micro_batch_size=2,
        new_tokens=4,
        rounds=2,
        processes=1,
        vllm=VLLM,
        eager=True,
    )
    figures = run_benchmark(options)
    stock, base, ours = figures["measured"]
    names = ["Qwen3ForCausalLM", "Qwen3ForCausalLM (Transformers backend)", "satformer"]
    assert [row["model"] for row in (stock, base, ours)] == names
    assert base["prefill_speed"] == base["decode_speed"] == 1
    assert min(ours[f"{what}_tokens_s"] for what in ("prefill", "decode")) > 0
    assert 0.1 < ours["decode_speed"] < 10
    assert all(name in format_table(figures) for name in names)
