"""Depth-Attention: which layers are read, the equation written out, what is cached and refused."""

import math

import pytest
import torch
from transformers import DynamicCache

from megatron_satformer.model.architectures.depth_attention import is_source
from tests.models import build_config, build_exported, build_twin

NAME = "depth_attention"
SHAPE = {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 4}
TWIN = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}


@pytest.mark.parametrize(
    ("layers", "stride", "sources"),
    [(4, None, [1, 3]), (5, None, [1, 3]), (11, None, [1, 6]), (6, 1, [1, 2, 3, 4, 5]), (4, 3, [1])]
    + [(2, None, [1]), (3, 2, [1])],
)
def test_which_layers_are_read(layers, stride, sources):
    config = build_config(NAME, **SHAPE | {"num_layers": layers}, depth_attention_stride=stride)
    assert [n for n in range(1, layers + 1) if is_source(config, n)] == sources
    assert config.summary.endswith(f"read {', '.join(map(str, sources))}")
    # nothing is carried that nobody reads, and K and V' of whatever is read
    from megatron_satformer.model.architectures.depth_attention import DEPTH_ATTENTION

    for n in range(1, layers):
        heads = DEPTH_ATTENTION.carry_behind(config, n).heads
        assert heads == 2 * len([source for source in sources if source <= n])


@pytest.mark.parametrize("stride", [0, 4, -1])
def test_a_stride_out_of_range(stride):
    with pytest.raises(
        ValueError, match=rf"depth_attention_stride \({stride}\) must be at least 1"
    ):
        build_config(NAME, **SHAPE, depth_attention_stride=stride)


def test_what_it_cannot_have_is_told():
    with pytest.raises(ValueError, match=r"num_layers \(1\) must be at least 2"):
        build_config(NAME, **SHAPE | {"num_layers": 1})
    with pytest.raises(ValueError, match=r"keys and values are sharded by KV head. Use TP 1 or 2"):
        build_config(NAME, **SHAPE, num_query_groups=2, tensor_model_parallel_size=4)


@torch.no_grad()
def test_equation_written_out():
    """One token and head at a time, in Python floats; a source's value is the mixed one."""
    model = build_twin(NAME, **TWIN, depth_attention_stride=2)
    layers = [layer.self_attn for layer in model.model.layers]
    q, k, v = (torch.randn(6, 1, 3, heads, 6) for heads in (4, 2, 2))
    carried, mixed = (), []
    for n, layer in enumerate(layers):
        out, carried = layer.mix_normed(q[n], k[n], v[n], carried)
        mixed.append(out)
    assert torch.equal(mixed[0], v[0])
    for n in range(1, 6):
        read = [j for j in (0, 2, 4) if j < n]
        for t in range(3):
            for g in range(2):
                qbar = [(q[n, 0, t, 2 * g, d] + q[n, 0, t, 2 * g + 1, d]) / 2 for d in range(6)]
                dots = [
                    sum(float(a * b) for a, b in zip(qbar, k[j, 0, t, g], strict=True))
                    for j in (*read, n)
                ]
                shares = [math.exp(dot / math.sqrt(6)) for dot in dots]
                values = [*(mixed[j][0, t, g] for j in read), v[n, 0, t, g]]
                wanted = sum(s / sum(shares) * x for s, x in zip(shares, values, strict=True))
                torch.testing.assert_close(mixed[n][0, t, g], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2, 3])
@torch.no_grad()
def test_decoding_computes_what_training_does(stride):
    """Token by token through the cache, which holds V'; with V_n in it the logits are others."""
    twin = build_twin(NAME, **TWIN, depth_attention_stride=stride)
    model = build_exported(twin).eval()
    ids = torch.randint(67, (2, 9), generator=torch.Generator().manual_seed(1))
    whole = twin(ids).logits

    def decode() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        steps = [
            model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(9)
        ]
        return torch.cat(steps, dim=1)

    scale = whole.abs().max()
    assert (decode() - whole).abs().max() < 1e-5 * scale

    # As the authors' code has it: the cache gets V_n, and the mix happens behind it.
    for layer in model.model.layers:
        _cache_raw_values(layer.self_attn)
    assert (decode() - whole).abs().max() > 1e-2 * scale


def _cache_raw_values(attention) -> None:
    mix = attention.mix_normed

    def mixed_for_this_token_alone(q, k, v, carried):
        _, carried = mix(q, k, v, carried)
        return v, carried

    attention.mix_normed = mixed_for_this_token_alone


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("groups", [6, 2])
def test_strides_equal_the_twin(on_ranks, stride, groups):
    options = {"architecture": NAME, "depth_attention_stride": stride, "num_query_groups": groups}
    on_ranks(1, "tests.model.ranks:equals_reference", options)
