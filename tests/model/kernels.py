"""Kernels against plain torch, forward and backward; see test_kernels.py and tests/gpu/.

    TRITON_INTERPRET=1 python -m tests.model.kernels

Odd sizes, strided views, sources at odd addresses, float32 and bfloat16.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from megatron_satformer.model import kernels
from megatron_satformer.model.gates import apply_gate
from megatron_satformer.model.mixing import gated_sum, mix, mix_heads, normed_products

# The interpreter cuts off where a GPU rounds, and both round once where torch rounds twice.
RTOL = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
TOKENS = (5, 2)
Case = tuple[
    str, Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]], list[Tensor]
]


def sums(dtype: torch.dtype) -> Iterator[Case]:
    """Weights of the model and of each token, the last of them a transposed view."""
    for m, n, d in ((1, 1, 7), (4, 3, 48), (5, 4, 130), (3, 12, 64)):
        for leading in ((), TOKENS):
            sources = [_odd_place(*TOKENS, d, dtype=dtype) for _ in range(n)]
            inputs = [_randn(*leading, n, m), *sources]

            def run(weights: Tensor, *sources: Tensor, fused: bool) -> tuple[Tensor, ...]:
                return mix(weights.transpose(-1, -2), sources, fused=fused)

            yield f"{m} of {n}, {leading}", run, inputs


def products(dtype: torch.dtype) -> Iterator[Case]:
    for tokens, d, k in ((10, 7, 3), (70, 130, 17), (33, 768, 6), (33, 40, 1)):
        inputs = [_randn(k, d), *(_odd_place(tokens, 2, d, dtype=dtype) for _ in range(3))]

        def run(weight: Tensor, *sources: Tensor, fused: bool) -> tuple[Tensor, ...]:
            return (normed_products(sources, weight.t(), 1e-6, fused=fused),)

        yield f"{tokens} x {d} x {k}", run, inputs


def heads(dtype: torch.dtype) -> Iterator[Case]:
    for m, n, g, d, kinds in ((5, 3, 2, 7, 1), (12, 4, 12, 300, 2), (4, 2, 20, 130, 2)):
        inputs = [_randn(m, n, g), *(_odd_place(g, d, dtype=dtype) for _ in range(n * kinds))]

        def run(weights: Tensor, *sources: Tensor, fused: bool, n: int = n) -> tuple[Tensor, ...]:
            parts = [sources[start : start + n] for start in range(0, len(sources), n)]
            return (mix_heads(weights, *parts, fused=fused),)

        yield f"{m} from {n} x {g}, {kinds} kinds", run, inputs


def gates(dtype: torch.dtype) -> Iterator[Case]:
    """V and the logits are views of what linear_qkv returns, and V' may be written over V."""
    for gate, in_place in product(kernels.GATES, (False, True)):
        inputs = [_randn(7, 3, 5 * 72 + 8, dtype=dtype), _randn(7, 3, 5, 24, dtype=dtype)]

        def run(
            qkv: Tensor, v1: Tensor, fused: bool, gate: str = gate, in_place: bool = in_place
        ) -> tuple[Tensor, ...]:
            rows, logits, _ = qkv.clone().split([5 * 72, 5, 3], dim=-1)
            value = rows.view(7, 3, 5, 72)[..., 48:]
            if fused:
                return (gated_sum(value, logits, v1, gate, in_place=in_place),)
            alpha = apply_gate(logits, gate, None).unsqueeze(-1)
            return (torch.addcmul(value, alpha, v1),)

        yield f"{gate}, {'in' if in_place else 'out of'} place", run, inputs


if kernels.DEVICE == "cpu":
    import triton.language as tl

    # The interpreter of Triton 3.7 counts to a number given at run time by int() of an array of
    # one element, which NumPy 2.5 refuses.
    tl.tensor.__index__ = lambda number: number.handle.data.item()

CHECKS = {check.__name__: check for check in (sums, products, heads, gates)}


def check(name: str) -> None:
    """Raises AssertionError where a kernel differs."""
    torch.manual_seed(0)
    for dtype, rtol in RTOL.items():
        for case, run, inputs in CHECKS[name](dtype):
            got, wanted = (
                _results(partial(run, fused=True), inputs),
                _results(partial(run, fused=False), inputs),
            )
            for mine, plain in zip(got, wanted, strict=True):
                off = (mine.double() - plain.double()).norm() / plain.double().norm()
                assert off <= rtol, f"{name}, {case}, {dtype}: {off:.1e}"


def _results(run: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> list[Tensor]:
    """What comes out, and the gradients of what goes in."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    generator = torch.Generator(out[0].device).manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, device=x.device).to(x) for x in out]
    return [*out, *torch.autograd.grad(out, leaves, upstream)]


def _randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=kernels.DEVICE)


def _odd_place(*shape: int, dtype: torch.dtype) -> Tensor:
    """Contiguous, one element behind an aligned address: as a view of a received buffer may be."""
    size = torch.Size(shape).numel()
    return _randn(size + 1, dtype=dtype)[1:].view(shape)


if __name__ == "__main__":
    for name in sys.argv[1:] or CHECKS:
        check(name)
        print(f"{name}: equal")
