"""Data of a comparison: what the options of retrieval tasks say is what is made."""

import json
from dataclasses import replace

import pytest

from megatron_satformer.comparison.prepare import RetrievalOptions


def test_options_reach_the_tasks(tmp_path):
    options = RetrievalOptions(retrieval_length=64, retrieval_words=128, pairs=4, power_a=1.0)
    folder = options.build(tmp_path, seq_length=256, samples=3)
    made = json.loads((folder / "retrieval.json").read_text())
    assert made["examples"]["train/mqar_64"] == 3 * 256 // 64
    assert made["vocab_size"] == 128
    assert (made["difficulty"]["pairs"], made["difficulty"]["power_a"]) == (4, 1.0)
    assert options.build(tmp_path, 256, 3) == folder
    harder = replace(options, pairs=8)
    assert harder.build(tmp_path, 256, 3) != folder


def test_a_length_that_does_not_divide_a_sample_is_refused(tmp_path):
    told = r"retrieval_length \(100\) must divide the size's sequence length \(256\)"
    with pytest.raises(ValueError, match=told):
        RetrievalOptions(retrieval_length=100).build(tmp_path, 256, None)
