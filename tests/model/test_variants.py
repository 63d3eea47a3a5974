"""Architectures and their controls, by name."""

import pytest

from megatron_satformer.model.architectures import PLAIN, TABLE, find_architecture
from megatron_satformer.model.variants import Variant, all_variants, find_variants
from tests.models import build_config


def test_every_architecture_without_controls_by_default():
    assert [variant.name for variant in find_variants()] == list(TABLE)


def test_controls_are_options_of_their_architecture():
    names = []
    for name in TABLE:
        record = find_architecture(name)
        names += [name, *record.controls]
        for options in record.controls.values():
            assert options.keys() <= record.own_options.keys()
            build_config(name, num_layers=4, hidden_size=8, num_attention_heads=2, **options)
    assert list(all_variants()) == names
    assert len(set(names)) == len(names)


def test_flags():
    options = {"value_gate": "tanh", "value_gate_bias": True, "hc_dynamic": False}
    flags = "--architecture a --value-gate tanh --value-gate-bias --no-hc-dynamic"
    assert Variant("b", "a", options).flags == flags.split()


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["gpt"], r"architectures \(gpt\) must be of transformer, "),
        ([PLAIN] * 2, r"architectures \(transformer\) must be named once"),
    ],
)
def test_unknown_and_repeated(names, told):
    with pytest.raises(ValueError, match=told):
        find_variants(names)
