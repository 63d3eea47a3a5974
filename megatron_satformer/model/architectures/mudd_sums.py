"""MUDDFormer's sums: what one of them computes, holds and starts from.

    A_n = GELU(RMSNorm(X_n) W1_n) W2_n + a_n        per token; the norm has no gain
    X^c_n = sum_j A^c_nj X_j,  over j <= n          c = q, k, v, r; behind the last layer r alone

Must not know: layers, attention.

Shapes: s sequence, b micro-batch, h hidden, C ways; "/tp": per rank.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_satformer.model.architectures.extended import SEED, Coefficients, seeded_generator
from megatron_satformer.model.architectures.record import OwnTensor
from megatron_satformer.model.mixing import mix, normed_products

NUM_WAYS = 4  # q, k, v and the residual
POST_GAIN = 1e-3


def starting_projection(shape: tuple[int, ...], seed: int = SEED) -> Tensor:
    """W1 with variance 1/h; of another seed, and in each layer, another."""
    generator = seeded_generator(seed, shape[0])
    return torch.randn(shape, generator=generator, device="cpu") * shape[1] ** -0.5


def starting_weights(shape: tuple[int, ...], ways: int) -> Tensor:
    """Static weights, flat, with which every sum is the newest output."""
    weights = torch.zeros(shape, device="cpu")
    weights.view(ways, -1)[:, -1] = 1
    return weights


class Aggregate(Coefficients):
    """X_0 .. X_n -> X^c_n of every way; its tensors are `aggregate_tensors`."""

    def forward(self, history: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """X_0 .. X_n, [s, b, h] ([s/tp, b, h] under sequence parallelism) -> C such tensors."""
        eps, fused = self.config.layernorm_epsilon, self.config.fused_blend
        weights = F.gelu(normed_products(history[-1:], self.w1.t(), eps, fused=fused).squeeze(-2))
        # [s, b, width], in float32 at least
        weights = weights @ self.w2.t().to(weights.dtype) + self.static.to(weights.dtype)
        weights = weights.unflatten(-1, (-1, len(history)))  # [s, b, C, n + 1]
        if not self.config.mudd_prepost_norm:
            return mix(weights, history, fused=fused)
        gains = self.pre_gains, self.post_gains
        return checkpoint(_normed_mix, weights, eps, fused, *gains, *history, use_reentrant=False)


def _normed_mix(
    weights: Tensor,
    eps: float,
    fused: bool,
    pre_gains: Tensor,
    post_gains: Tensor,
    *history: Tensor,
) -> tuple[Tensor, ...]:
    """`mix` between norms, beside the newest; run again in backward, to keep no normed copies."""
    newest, size = history[-1], history[-1].shape[-1:]
    gains = pre_gains.view(-1, *size)
    normed = [_norm(x, gain, eps) for x, gain in zip(history, gains, strict=True)]
    sums = zip(mix(weights, normed, fused=fused), post_gains.view(-1, *size), strict=True)
    return tuple((_norm(x, gain, eps) + newest).to(newest.dtype) for x, gain in sums)


def _norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, wide.shape[-1:], gain.to(wide.dtype), eps)


def aggregate_tensors(options: Any, n: int) -> list[OwnTensor]:
    """What makes the X^c_n holds; one way for the last n, which stands in the layer itself."""
    h, last = options.hidden_size, n == options.num_layers
    ways, place = (1, "final_aggregate") if last else (NUM_WAYS, "aggregate")
    size = ways * (n + 1)
    width = _width(size, last) if options.mudd_form == "released" else size
    seeded = partial(starting_projection, seed=getattr(options, "seed", SEED))

    def build(name: str, shape: tuple[int, ...], start: Callable[..., Tensor]) -> OwnTensor:
        theirs, key, fp32 = (f"aggregate.{name}",), f"{place}.{name}", name == "static"
        return OwnTensor(key, theirs, shape, fp32=fp32, start=start, behind=not last)

    normed = options.mudd_prepost_norm
    found = [
        build("w1", (width, h), seeded),
        build("w2", (size, width), torch.zeros),
        build("static", (size,), torch.zeros if normed else partial(starting_weights, ways=ways)),
    ]
    if normed:
        found += [
            build("pre_gains", ((n + 1) * h,), torch.ones),
            build("post_gains", (ways * h,), partial(torch.full, fill_value=POST_GAIN)),
        ]
    return found


def _width(size: int, last: bool) -> int:
    """Of W1 in the models that the authors released: wider than their equation has it."""
    return ((4 * size if last else size) // 64 + 1) * 64
