import pytest

from megatron_satformer.config import SATFormerConfig, check_value_residual

SHAPE = {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("last_k", "mixing"), [(None, [2, 3, 4]), (3, [2, 3, 4]), (2, [3, 4]), (1, [4])]
)
def test_mixing_layers(last_k, mixing):
    config = SATFormerConfig(**SHAPE, value_residual_last_k=last_k)
    assert [n for n in range(1, 5) if config.mixes(n)] == mixing
    assert config.num_mixing_layers == len(mixing)


def test_transformer_never_mixes():
    config = SATFormerConfig(**SHAPE, architecture="transformer")
    assert config.num_mixing_layers == 0
    assert not config.hetereogenous_dist_checkpoint


@pytest.mark.parametrize("last_k", [0, 4, -1])
def test_last_k_out_of_range(last_k):
    with pytest.raises(ValueError, match=rf"value_residual_last_k \({last_k}\) must be at least 1"):
        SATFormerConfig(**SHAPE, value_residual_last_k=last_k)


def test_one_layer_has_nothing_to_mix():
    with pytest.raises(ValueError, match=r"num_layers \(1\) must be at least 2"):
        SATFormerConfig(**SHAPE | {"num_layers": 1})


def test_message_names_the_valid_sizes():
    with pytest.raises(ValueError, match=r"num_query_groups \(6\).*\(4\).*Use TP 1 or 2 or 3 or 6"):
        check_value_residual(architecture="satformer", num_layers=4, last_k=None, groups=6, tp=4)


@pytest.mark.parametrize("scaled", [False, True])
def test_output_projections_are_unscaled_unless_asked(scaled):
    import torch

    config = SATFormerConfig(**SHAPE, scaled_output_init=scaled, init_method_std=0.5)
    torch.manual_seed(0)
    std = config.output_layer_init_method(torch.empty(400, 400)).std().item()
    assert std == pytest.approx(0.5 / (8**0.5 if scaled else 1), rel=0.02)
