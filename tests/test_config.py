import pytest
import torch

from tests.models import build_config

SHAPE = {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 4}


@pytest.mark.parametrize("scaled", [False, True])
def test_output_projections_are_unscaled_unless_asked(scaled):
    config = build_config(**SHAPE, scaled_output_init=scaled, init_method_std=0.5)
    torch.manual_seed(0)
    std = config.output_layer_init_method(torch.empty(400, 400)).std().item()
    assert std == pytest.approx(0.5 / (8**0.5 if scaled else 1), rel=0.02)


def test_a_transformers_checkpoint_has_alike_layers():
    config = build_config(**SHAPE)
    assert config.hetereogenous_dist_checkpoint
    config.expect_transformer(True)
    assert config.expects_transformer
    assert not config.hetereogenous_dist_checkpoint
    config.expect_transformer(False)
    assert config.hetereogenous_dist_checkpoint


def test_fused_rope_is_refused():
    with pytest.raises(NotImplementedError, match=r"fused_single_qkv_rope \(True\)"):
        build_config(**SHAPE, fused_single_qkv_rope=True)
