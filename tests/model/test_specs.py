"""The specs name the right modules; Transformer Engine's own where it is installed."""

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_satformer.arguments import has_transformer_engine
from megatron_satformer.model.architectures import TABLE, find_architecture
from megatron_satformer.model.norm import build_norm
from megatron_satformer.model.sdpa import ScaledDotProductAttention
from megatron_satformer.model.specs import build_block_spec
from tests import models

EVERY = pytest.mark.parametrize("architecture", TABLE)


def build_config(**options):
    shape = {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 4, "qk_layernorm": True}
    return models.build_config(**shape | {"normalization": "RMSNorm"} | options)


@EVERY
def test_local_spec(architecture):
    config = build_config(architecture=architecture, transformer_impl="local")
    spec = build_block_spec(config, pp_rank=0)
    assert len(spec.layer_specs) == 4
    assert spec.layer_norm is build_norm
    layer = spec.layer_specs[0]
    record = find_architecture(architecture)
    assert layer.module is record.layer
    assert layer.submodules.self_attention.module is record.attention
    attention = layer.submodules.self_attention.submodules
    assert attention.core_attention is ScaledDotProductAttention
    # Keys are those of Transformer Engine, where the norms are fused into the linears.
    assert layer.submodules.sharded_state_dict_keys_map == {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }


@EVERY
@pytest.mark.parametrize("every", [2, [1, 0, 1, 0]], ids=str)
def test_experts_change_the_mlp_alone(architecture, every):
    options = {"architecture": architecture, "transformer_impl": "local"}
    dense = build_block_spec(build_config(**options), pp_rank=0).layer_specs[0].submodules
    config = build_config(**options, num_moe_experts=4, moe_ffn_hidden_size=8, moe_layer_freq=every)
    layers = [spec.submodules for spec in build_block_spec(config, pp_rank=0).layer_specs]
    assert [layer.mlp.func is MoELayer for layer in layers] == [True, False, True, False]
    for layer in layers:
        assert layer.self_attention == dense.self_attention
        assert layer.input_layernorm is layer.pre_mlp_layernorm is build_norm
    # As under Transformer Engine, which fuses this norm into a dense MLP only.
    renamed = ["pre_mlp_layernorm." in layer.sharded_state_dict_keys_map for layer in layers]
    assert renamed == [False, True, False, True]


def test_attention_backend_local_is_megatrons():
    config = build_config(transformer_impl="local", attention_backend=AttnBackend.local)
    layer = build_block_spec(config, pp_rank=0).layer_specs[0]
    core = layer.submodules.self_attention.submodules.core_attention
    assert core is DotProductAttention


@pytest.mark.skipif(not has_transformer_engine(), reason="Transformer Engine is not installed")
@EVERY
def test_engine_spec(architecture):
    from megatron.core.extensions.transformer_engine import (
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    config = build_config(architecture=architecture, transformer_impl="transformer_engine")
    spec = build_block_spec(config, pp_rank=0)
    assert spec.layer_norm is TENorm
    self_attention = spec.layer_specs[0].submodules.self_attention
    assert self_attention.module is find_architecture(architecture).attention
    assert self_attention.submodules.linear_qkv is TELayerNormColumnParallelLinear
    assert self_attention.submodules.core_attention is TEDotProductAttention
    assert self_attention.submodules.linear_proj is TERowParallelLinear


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_fused_attention_equals_megatrons(groups):
    """The torch kernel against the plain softmax, forward and backward, odd sizes."""
    torch.manual_seed(1)
    config = build_config(num_query_groups=groups, kv_channels=6, attention_dropout=0.0)
    attention = ScaledDotProductAttention(config, 1, None, "self")
    query, key, value = (
        torch.randn(7, 3, heads, 6, requires_grad=True) for heads in (4, groups, groups)
    )
    got = attention(query, key, value, None)
    grown = [t.repeat_interleave(4 // groups, dim=2) for t in (key, value)]
    scores = torch.einsum("qbnd,kbnd->bnqk", query, grown[0]) * 6**-0.5
    forbidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(forbidden, float("-inf")).softmax(-1)
    wanted = torch.einsum("bnqk,kbnd->qbnd", weights, grown[1]).flatten(2)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(attention(query, key, value, forbidden[None, None]), wanted)
    upstream = torch.randn_like(got)
    inputs = (query, key, value)
    for mine, plain in zip(
        torch.autograd.grad(got, inputs, upstream),
        torch.autograd.grad(wanted, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain)


def test_fused_attention_refuses_what_it_lacks():
    config = build_config(softmax_type="off-by-one")
    with pytest.raises(NotImplementedError, match="Use --attention-backend local"):
        ScaledDotProductAttention(config, 1, None, "self")


@pytest.mark.skipif(not has_transformer_engine(), reason="Transformer Engine is not installed")
@pytest.mark.parametrize("ranks", [1, 2])
@EVERY
def test_engine_holds_the_same_checkpoint(on_ranks, architecture, ranks):
    options = {"architecture": architecture}
    on_ranks(ranks, "tests.model.ranks:engine_holds_the_same_checkpoint", options)
