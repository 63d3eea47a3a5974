"""The benchmark of the exported classes compares like with like."""

from dataclasses import replace

import pytest

from megatron_satformer.benchmark.fresh_process import measure_in_own_process
from megatron_satformer.benchmark.hugging_face import (
    BenchmarkOptions,
    _peak_memory,
    _run_processes,
    build_model,
    median_speed,
)
from megatron_satformer.checkpoint.hugging_face.code import model_class
from megatron_satformer.model.architectures import TABLE

TINY = BenchmarkOptions(
    architectures=("transformer",),
    hidden_size=32,
    num_layers=2,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=48,
    vocab_size=64,
    seq_length=16,
    new_tokens=3,
    rounds=2,
)


@pytest.mark.parametrize("qk_layernorm", [True, False])
def test_same_shape(qk_layernorm):
    """Ours without a value residual has the very parameters of transformers' own."""
    options = replace(TINY, qk_layernorm=qk_layernorm)
    ours, theirs = (
        {name: p.shape for name, p in build_model(options, model).named_parameters()}
        for model in ("transformer", options.stock)
    )
    assert ours == theirs


@pytest.mark.parametrize("architecture", TABLE)
def test_every_architecture_can_be_measured(architecture):
    options = replace(TINY, architectures=(architecture,))
    assert options.names == (options.stock, architecture)
    assert type(build_model(options, architecture)) is model_class(architecture)


def test_speed_is_of_neighbours():
    """The machine was slow at first: the medians have a ratio of 0.2."""
    assert median_speed([10.0, 1.0, 1.0], [5.0, 5.0, 0.5]) == 2


@pytest.mark.slow
def test_models_take_turns_in_every_process():
    prefill, decode = _run_processes(replace(TINY, processes=2))
    assert {name: len(taken) for name, taken in prefill.items()} == dict.fromkeys(TINY.names, 4)
    assert {name: len(taken) for name, taken in decode.items()} == dict.fromkeys(TINY.names, 12)
    assert min(min(taken) for taken in (*prefill.values(), *decode.values())) > 0


@pytest.mark.slow
def test_peak_memory_holds_the_weights():
    """60 MiB of embeddings, and little else."""
    options = replace(TINY, hidden_size=240, num_attention_heads=12, vocab_size=65536)
    assert 60 < measure_in_own_process(_peak_memory, options, "transformer") / 2**20 < 80


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden_size": 30}, r"hidden_size \(30\) must be a multiple of num_attention_heads"),
        ({"num_query_groups": 3}, "num_attention_heads"),
        ({"rounds": 1}, "rounds"),
        ({"processes": 0}, "processes"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        replace(TINY, **options)
