from argparse import Namespace

import pytest

from megatron_satformer.model.architectures.value_residual import (
    ValueResidualConfig,
    refuse_beside_replicas,
)
from tests.models import build_config
from tests.parallel.layouts import MIXING

SHAPE = {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 4}
BOTH = pytest.mark.parametrize("architecture", MIXING)


@BOTH
@pytest.mark.parametrize(
    ("last_k", "mixing"), [(None, [2, 3, 4]), (3, [2, 3, 4]), (2, [3, 4]), (1, [4])]
)
def test_mixing_layers(architecture, last_k, mixing):
    config = build_config(architecture, **SHAPE, value_residual_last_k=last_k)
    assert [n for n in range(1, 5) if config.mixes(n)] == mixing
    assert config.num_mixing_layers == len(mixing)


@BOTH
@pytest.mark.parametrize("last_k", [0, 4, -1])
def test_last_k_out_of_range(architecture, last_k):
    with pytest.raises(ValueError, match=rf"value_residual_last_k \({last_k}\) must be at least 1"):
        build_config(architecture, **SHAPE, value_residual_last_k=last_k)


@BOTH
def test_one_layer_has_nothing_to_mix(architecture):
    with pytest.raises(ValueError, match=r"num_layers \(1\) must be at least 2"):
        build_config(architecture, **SHAPE | {"num_layers": 1})


def test_message_names_the_valid_sizes():
    options = build_config(**SHAPE)
    with pytest.raises(ValueError, match=r"num_query_groups \(6\).*\(4\).*Use TP 1 or 2 or 3 or 6"):
        ValueResidualConfig.check_options(options, num_layers=4, groups=6, tp=4)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("hidden_dropout", 0.1, "must be 0.0 with"),
        ("position_embedding_type", "learned_absolute", "must be rope or none or yarn with"),
        ("transformer_impl", "transformer_engine", "must be local with"),
        ("optimizer", "muon", "must be adam or sgd with"),
        ("ckpt_format", "torch", "must be torch_dist with"),
    ],
)
def test_what_v1_from_ids_cannot_have(option, value, told):
    refuse_beside_replicas(Namespace(v1_transport="carry", **{option: value}))
    with pytest.raises(ValueError, match=rf"{option} \({value}\) {told} v1_transport"):
        refuse_beside_replicas(Namespace(v1_transport="recompute", **{option: value}))
    refuse_beside_replicas(Namespace(v1_transport="recompute"))
