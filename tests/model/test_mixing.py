"""Weighted sums and normed products equal plain autograd, and keep nothing but references."""

import pytest
import torch

from megatron_satformer.model.mixing import (
    ELEMENTWISE,
    gated_sum,
    mix,
    mix_heads,
    normed_products,
    weighted_sum,
)

TOKENS = (5, 2)


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("leading", [(), TOKENS], ids=["static", "per token"])
def test_mix_is_the_sum_and_so_are_its_gradients(leading):
    weights, sources = randn(*leading, 2, 3), [randn(*TOKENS, 7) for _ in range(3)]
    stacked = torch.stack(sources, dim=-2)
    expected = torch.einsum(f"{'sb' if leading else ''}ij,sbjd->sbid", weights, stacked)
    torch.testing.assert_close(torch.stack(mix(weights, sources), dim=-2), expected)
    assert torch.autograd.gradcheck(lambda w, *x: mix(w, x), (weights, *sources))
    assert torch.autograd.gradcheck(
        lambda w, *x: weighted_sum(w[..., 0, :], x), (weights, *sources)
    )


@pytest.mark.parametrize("kinds", [1, 2])
def test_heads_are_mixed_across_sources_and_heads(kinds):
    """5 outputs from 3 sources of 2 heads."""
    weights = randn(5, 3, 2)
    sources = [[randn(2, 7) for _ in range(3)] for _ in range(kinds)]
    stacked = torch.stack([torch.stack(of_kind) for of_kind in sources])
    expected = torch.einsum("mng,cngd->mcd", weights, stacked)
    torch.testing.assert_close(mix_heads(weights, *sources), expected)
    flat = [source for of_kind in sources for source in of_kind]

    def mixed(w, *x):
        return mix_heads(w, *(x[start : start + 3] for start in range(0, len(x), 3)))

    assert torch.autograd.gradcheck(mixed, (weights, *flat))


def test_normed_products_are_the_norm_and_the_product():
    sources, weight = [randn(*TOKENS, 7) for _ in range(2)], randn(7, 3)
    stacked = torch.stack(sources, dim=-2)
    expected = torch.nn.functional.rms_norm(stacked, (7,), eps=1e-3) @ weight
    torch.testing.assert_close(normed_products(sources, weight, 1e-3), expected)
    assert torch.autograd.gradcheck(lambda w, *x: normed_products(x, w, 1e-3), (weight, *sources))


def test_bf16_is_added_up_in_float32():
    """64 sources of 1 + 2^-7, each with weight 1: in bf16 their sum would stop growing evenly."""
    sources = [torch.full((1, 1, 4), 1 + 2**-7, dtype=torch.bfloat16) for _ in range(64)]
    summed = weighted_sum(torch.ones(64, dtype=torch.bfloat16), sources)
    assert summed.dtype == torch.bfloat16
    assert summed.unique().tolist() == [64.5]
    heads = [source.view(1, 4) for source in sources]
    mixed = mix_heads(torch.ones(1, 64, 1, dtype=torch.bfloat16), heads)
    assert mixed.dtype == torch.bfloat16
    assert mixed.unique().tolist() == [64.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_references_are_kept(dtype):
    sources = [randn(*TOKENS, 64, dtype=dtype) for _ in range(4)]
    weights, projection = randn(*TOKENS, 2, 4, dtype=torch.float32), randn(64, 3, dtype=dtype)
    heads, router = [s.flatten(0, 1) for s in sources], randn(3, 4, 10, dtype=dtype)
    known = {t.data_ptr() for t in (*sources, weights, projection, router)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mix(weights, sources)
        normed_products(sources[:1], projection, 1e-6)
        mix_heads(router, heads)
    tokens = TOKENS[0] * TOKENS[1]
    copies = [t for t in kept if t.data_ptr() not in known]
    assert all(t.numel() <= tokens * 3 for t in copies)


def test_what_needs_no_gradient_gets_none():
    fixed = torch.randn(*TOKENS, 7)
    source, weights = randn(*TOKENS, 7, dtype=torch.float32), torch.ones(2)
    weighted_sum(weights, [fixed, source]).sum().backward()
    assert fixed.grad is None
    assert torch.equal(source.grad, torch.ones_like(source))
    first, second = torch.randn(2, 7), randn(2, 7, dtype=torch.float32)
    mix_heads(torch.ones(1, 2, 2), [first, second]).sum().backward()
    assert first.grad is None
    assert torch.equal(second.grad, torch.ones_like(second))


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("gate", ELEMENTWISE)
def test_gated_sum_is_the_sum_and_so_are_its_gradients(gate, in_place):
    """V and the logits are views of one buffer, as of linear_qkv's."""
    buffer, v1 = randn(*TOKENS, 10), randn(*TOKENS, 2, 4)

    def blend(buffer, v1):
        value, logits = (buffer * 2).split([8, 2], dim=-1)
        value, _ = value.view(*TOKENS, 2, 4).split([4, 0], dim=-1)
        return gated_sum(value, logits, v1, gate, in_place=in_place)

    doubled = buffer.detach() * 2
    alpha = ELEMENTWISE[gate][0](doubled[..., 8:]).unsqueeze(-1)
    torch.testing.assert_close(blend(buffer, v1), doubled[..., :8].view_as(v1) + alpha * v1)
    assert torch.autograd.gradcheck(blend, (buffer, v1))
