import pytest

from megatron_satformer.model.architectures.value_residual import ValueResidualConfig
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
