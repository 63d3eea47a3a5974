"""Weighted sums of what earlier layers made, whose weights are learned or computed per token.

The sources are held by reference: nothing that grows with their number is stacked, copied or kept
for backward beside them and the weights. Everything is added up in float32 at least, and returned
in the dtype of the sources. On a GPU by the Triton kernels of `kernels`; what is here is what they
compute. Must not know: architectures, parallelism.

Shapes: n sources, m sums, g heads, d any last axis, k columns; "..." leading axes such as [s, b].
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_satformer.model import kernels


def mix(weights: Tensor, sources: Sequence[Tensor], *, fused: bool = True) -> tuple[Tensor, ...]:
    """out_i = sum_j weights[..., i, j] * sources_j.

    Args:
        weights: [m, n], the same for every token, or [..., m, n], of each.
        sources: n tensors [..., d] of one dtype.
        fused: whether a kernel may do it, as in all of these functions.

    Returns:
        m tensors [..., d].
    """
    return _Mix.apply(fused, weights, *sources)


def weighted_sum(weights: Tensor, sources: Sequence[Tensor], *, fused: bool = True) -> Tensor:
    """sum_j weights[j] * sources_j: `mix` to one sum. weights: [n] or [..., n]."""
    (out,) = mix(weights.unsqueeze(-2), sources, fused=fused)
    return out


def mix_heads(weights: Tensor, *kinds: Sequence[Tensor], fused: bool = True) -> Tensor:
    """out[i, c] = sum_j sum_g weights[i, j, g] * kinds[c][j][g].

    Args:
        weights: [m, n, g].
        *kinds: of each n tensors [g, d], all of one dtype.
        fused: as `mix`'s.

    Returns:
        [m, kinds, d].
    """
    return _MixHeads.apply(fused, weights, *(source for sources in kinds for source in sources))


def normed_products(
    sources: Sequence[Tensor], weight: Tensor, eps: float, *, fused: bool = True
) -> Tensor:
    """RMSNorm(x) @ weight of every x, the norm without gain; keeps references, no normed copies.

    Args:
        sources: n tensors [..., d] of one dtype.
        weight: [d, k].
        eps: added to the mean square.
        fused: as `mix`'s.

    Returns:
        [..., n, k], in float32 at least.
    """
    products, squares = _Products.apply(fused, weight, *sources)
    return products * torch.rsqrt(squares + eps)


def gated_sum(
    value: Tensor,
    logits: Tensor,
    v1: Tensor,
    gate: str,
    *,
    fused: bool = True,
    in_place: bool = False,
) -> Tensor:
    """Value + gate(logits) v1; keeps the logits and v1 for backward, and not value.

    Args:
        value: [s, b, g, d].
        logits: [s, b, g].
        v1: [s, b, g, d].
        gate: one of `ELEMENTWISE`.
        fused: as `mix`'s.
        in_place: write over value, of which nothing may have been kept. The logits are kept as
            they are then, else what is kept holds nothing that they are a view of.
    """
    return _GatedSum.apply(value, logits, v1, gate, fused, in_place)


TOKENS = 256  # of a block, on a CPU
_ops = torch.ops.aten
# Gates of one logit alone, and their gradients, from that of alpha and alpha, as autograd has them.
ELEMENTWISE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": (torch.relu, lambda gradient, alpha: _ops.threshold_backward(gradient, alpha, 0)),
    "sigmoid": (torch.sigmoid, lambda gradient, alpha: _ops.sigmoid_backward(gradient, alpha)),
    "tanh": (torch.tanh, lambda gradient, alpha: _ops.tanh_backward(gradient, alpha)),
    "identity": (lambda logits: logits, lambda gradient, alpha: gradient),
}


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        logits: Tensor,
        v1: Tensor,
        gate: str,
        fused: bool,
        in_place: bool,
    ) -> Tensor:
        ctx.gate, ctx.fused = gate, fused and kernels.usable(value, logits, v1)
        # `data`, because autograd lets nobody write into one of several views of a buffer.
        out = value.data if in_place else v1.new_empty(v1.shape)
        if ctx.fused:
            ctx.save_for_backward(logits if in_place else logits.clone(), v1, None)
            return kernels.blend_forward(value, logits, v1, gate, out)
        alpha = ELEMENTWISE[gate][0](logits)
        # A logit of the buffer costs nothing; where the buffer goes, alpha is as large.
        kept = (logits, v1, None) if in_place else (None, v1, alpha.contiguous())
        ctx.save_for_backward(*kept)
        return torch.addcmul(value, alpha.unsqueeze(-1).to(value.dtype), v1, out=out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, v1, alpha = ctx.saved_tensors
        if ctx.fused:
            own, into = kernels.blend_backward(logits, v1, ctx.gate, gradient)
        else:
            gate, gate_backward = ELEMENTWISE[ctx.gate]
            alpha = gate(logits) if alpha is None else alpha
            to_alpha = gradient.new_empty(alpha.shape)
            into = gradient.new_empty(gradient.shape)
            # Of some tokens at once: what is multiplied is still in the cache when it is added up.
            many = gradient.size(0) if gradient.is_cuda else TOKENS
            parts = (x.split(many) for x in (gradient, v1, alpha, to_alpha, into))
            for given, first, weight, own, scaled in zip(*parts, strict=True):
                torch.sum(given * first, -1, out=own)
                torch.mul(given, weight.unsqueeze(-1).to(given.dtype), out=scaled)
            own = gate_backward(to_alpha.to(alpha.dtype), alpha)
        return gradient, own, into, None, None, None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: bool, weights: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weights, *sources)
        ctx.fused = fused and _fits(weights, *sources)
        if ctx.fused:
            return kernels.mix_forward(weights, sources)
        return tuple(_combine(row, sources) for row in _columns(weights))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weights, *sources = ctx.saved_tensors
        _, to_weights, *to_sources = ctx.needs_input_grad
        if ctx.fused:
            own, into = kernels.mix_backward(weights, sources, gradients, to_sources)
            return None, own.to(weights.dtype), *into
        columns = zip(*_columns(weights), strict=True)  # per source, its weight in every sum
        into = [
            _combine(column, gradients) if wanted else None
            for column, wanted in zip(columns, to_sources, strict=True)
        ]
        if not to_weights:
            return None, None, *into
        rows = [[_dot(g, x, weights.dim() == 2) for x in sources] for g in gradients]
        own = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
        return None, own.to(weights.dtype), *into


class _MixHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: bool, weights: Tensor, *sources: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *sources)
        ctx.n = n = weights.size(1)
        ctx.fused = fused and kernels.usable(weights, *sources)
        if ctx.fused:
            return kernels.heads_forward(weights, sources)
        columns = _wide(weights).unbind(1)  # per source, [m, g]
        shape = (weights.size(0), len(sources) // n, sources[0].size(-1))
        out = columns[0].new_zeros(shape)
        for place, source in enumerate(sources):
            out[:, place // n].addmm_(columns[place % n], _wide(source))
        return out.to(sources[0].dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, *sources = ctx.saved_tensors
        _, to_weights, *to_sources = ctx.needs_input_grad
        if ctx.fused:
            own, into = kernels.heads_backward(weights, sources, gradient, to_sources)
            return None, own.to(weights.dtype), *into
        columns, kinds = _wide(weights).unbind(1), _wide(gradient).unbind(1)
        into = [
            (columns[place % ctx.n].t() @ kinds[place // ctx.n]).to(source.dtype)
            if to_sources[place]
            else None
            for place, source in enumerate(sources)
        ]
        if not to_weights:
            return None, None, *into
        own = torch.zeros_like(weights, dtype=columns[0].dtype)
        for place, source in enumerate(sources):
            own[:, place % ctx.n] += kinds[place // ctx.n] @ _wide(source).t()
        return None, own.to(weights.dtype), *into


class _Products(torch.autograd.Function):
    """x @ weight, [..., n, k], and the mean of x^2, [..., n, 1]."""

    @staticmethod
    def forward(ctx: Any, fused: bool, weight: Tensor, *sources: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight, *sources)
        ctx.fused = fused and kernels.usable(weight, *sources)
        if ctx.fused:
            return kernels.products_forward(weight, sources)
        wide = [_wide(x) for x in sources]
        products = [x @ weight.to(x.dtype) for x in wide]
        squares = [x.square().mean(-1, keepdim=True) for x in wide]
        return torch.stack(products, dim=-2), torch.stack(squares, dim=-2)

    @staticmethod
    def backward(ctx: Any, products: Tensor, squares: Tensor) -> tuple[Tensor | None, ...]:
        weight, *sources = ctx.saved_tensors
        if ctx.fused:
            own, into = kernels.products_backward(weight, sources, products, squares)
            return None, own.to(weight.dtype), *into
        into, own = [], torch.zeros_like(weight, dtype=products.dtype)
        for x, product, square in zip(
            sources, products.unbind(-2), squares.unbind(-2), strict=True
        ):
            wide = _wide(x)
            gradient = product @ weight.to(wide.dtype).t() + wide * (square * (2 / x.size(-1)))
            into.append(gradient.to(x.dtype))
            own += wide.flatten(0, -2).t() @ product.flatten(0, -2)
        return None, own.to(weight.dtype), *into


def _fits(weights: Tensor, *sources: Tensor) -> bool:
    most = kernels.padded(weights.size(-2)) * kernels.padded(sources[0].size(-1))
    return kernels.usable(weights, *sources, most=most)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _columns(weights: Tensor) -> list[tuple[Tensor, ...]]:
    """Per sum, the weight of every source, [..., 1] each."""
    return [row.unsqueeze(-1).unbind(-2) for row in weights.unbind(-2)]


def _combine(weights: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """sum_j weights_j tensors_j, in the dtype of the tensors."""
    first, *others = map(_wide, tensors)
    out = first * weights[0].to(first.dtype)
    for weight, tensor in zip(weights[1:], others, strict=True):
        out.addcmul_(tensor, weight.to(out.dtype))
    return out.to(tensors[0].dtype)


def _dot(gradient: Tensor, source: Tensor, whole: bool) -> Tensor:
    """Over the last axis, or over all of them."""
    product = _wide(gradient) * _wide(source)
    return product.sum() if whole else product.sum(-1)
