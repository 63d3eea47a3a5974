"""Triton kernels for `mixing`: one pass over what torch would read once per operation.

A program has one token, or a block of them; sources are
found through a table of addresses, so nothing is stacked. Everything is added up in float32, in
one order, so that results do not change from run to run.

Must not know: autograd, architectures.
"""

import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

GATES = "relu", "sigmoid", "tanh", "identity"
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
MOST = 1 << 16  # numbers that a program of `mix` holds: more would leave its registers
TOKENS, WIDTH = 32, 64  # a block of `product`
COLUMNS = 128  # a block of `heads`
ROWS = 32  # a block of `blend`
SPLITS = 64  # programs that share the tokens of a gradient of `product`


def usable(*tensors: Tensor, most: int = 0) -> bool:
    """Whether the kernels take these tensors: on a GPU, at most float32, with Triton there.

    Args:
        *tensors: what a kernel reads.
        most: numbers that one program would hold.
    """
    if most > MOST or not _has_triton():
        return False
    return all(x.device.type == DEVICE and x.dtype in _TYPES for x in tensors)


_TYPES = torch.float32, torch.bfloat16, torch.float16


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _kernels() -> Any:
    from megatron_satformer.model import triton_kernels

    return triton_kernels


def padded(number: int) -> int:
    """The power of two that a block of so many numbers has."""
    return 1 << max(0, number - 1).bit_length()


def mix_forward(weights: Tensor, sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """out_i = sum_j weights[..., i, j] sources_j.

    Args:
        weights: [m, n] or [..., m, n], at most float32.
        sources: n tensors [..., d] of one dtype.

    Returns:
        m tensors [..., d].
    """
    m, n = weights.shape[-2:]
    sources = [x.contiguous() for x in sources]
    out = [torch.empty_like(sources[0]) for _ in range(m)]
    _kernels().mix_forward[(_tokens(sources[0]),)](
        *(_table(x) for x in (sources, out)),
        *_by_token(weights),
        sources[0].size(-1),
        N=n,
        M=m,
        **_sizes(m, sources, out),
    )
    return tuple(out)


def mix_backward(
    weights: Tensor, sources: Sequence[Tensor], gradients: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of `mix_forward`, of the weights in float32, and of the sources that want one."""
    m, n = weights.shape[-2:]
    sources = [x.contiguous() for x in sources]
    gradients = [x.contiguous() for x in gradients]
    into = [torch.empty_like(x) if w else None for x, w in zip(sources, wanted, strict=True)]
    tokens = _tokens(sources[0])
    own = torch.empty(tokens, m, n, dtype=torch.float32, device=weights.device)
    _kernels().mix_backward[(tokens,)](
        *(_table(x) for x in (sources, gradients, into)),
        *_by_token(weights),
        own,
        sources[0].size(-1),
        N=n,
        M=m,
        **_sizes(m, sources, gradients, into),
    )
    return own.sum(0) if weights.dim() == 2 else own.view(weights.shape), into


def products_forward(weight: Tensor, sources: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of n sources x [..., d]: x @ weight [d, k], and the mean of x^2.

    Returns:
        [..., n, k] and [..., n, 1], both in float32.
    """
    weight, sources = weight.contiguous(), [x.contiguous() for x in sources]
    x, n, k = sources[0], len(sources), weight.size(1)
    products = x.new_empty(*x.shape[:-1], n, k, dtype=torch.float32)
    squares = x.new_empty(*x.shape[:-1], n, 1, dtype=torch.float32)
    tokens = _tokens(x)
    for j, x in enumerate(sources):
        _kernels().product_forward[(-(-tokens // TOKENS),)](
            x, weight, products, squares, tokens, k, j, n, D=x.size(-1), **_blocks(k)
        )
    return products, squares


def products_backward(
    weight: Tensor, sources: Sequence[Tensor], products: Tensor, squares: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of `products_forward`: of the weight, in float32, and of the sources."""
    weight, sources = weight.contiguous(), [x.contiguous() for x in sources]
    products, squares = products.contiguous(), squares.contiguous()
    n, (d, k), tokens = len(sources), weight.shape, _tokens(sources[0])
    columns = -(-d // WIDTH)
    share = -(-tokens // (SPLITS * TOKENS)) * TOKENS
    own = weight.new_empty(n, SPLITS, d, k, dtype=torch.float32)
    into = [torch.empty_like(x) for x in sources]
    for j, x in enumerate(sources):
        where = tokens, k, j, n
        _kernels().product_into[(-(-tokens // TOKENS), columns)](
            x, weight, products, squares, into[j], *where, D=d, **_blocks(k)
        )
        _kernels().product_own[(SPLITS, columns)](
            x, products, own[j], *where, D=d, SHARE=share, **_blocks(k)
        )
    return own.sum((0, 1)), into


def heads_forward(weights: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """out[i, c] = sum_j sum_g weights[i, j, g] sources[c n + j][g].

    Args:
        weights: [m, n, g], at most float32.
        sources: kinds n tensors [g, x] of one dtype.

    Returns:
        [m, kinds, x].
    """
    m, n, _ = weights.shape
    sources = [x.contiguous() for x in sources]
    kinds, size = len(sources) // n, sources[0].size(1)
    out = sources[0].new_empty(m, kinds, size)
    _kernels().heads_forward[(-(-size // COLUMNS), kinds)](
        _table(sources), out, weights.contiguous(), size, **_heads(weights, sources)
    )
    return out


def heads_backward(
    weights: Tensor, sources: Sequence[Tensor], gradient: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of `heads_forward`, of the weights in float32, and of the sources that want one."""
    m, n, g = weights.shape
    sources, gradient = [x.contiguous() for x in sources], gradient.contiguous()
    kinds, size = len(sources) // n, sources[0].size(1)
    into = [torch.empty_like(x) if w else None for x, w in zip(sources, wanted, strict=True)]
    blocks = -(-size // COLUMNS)
    if any(wanted):
        _kernels().heads_into[(blocks, kinds)](
            _table(into), gradient, weights.contiguous(), size, **_heads(weights, sources, into)
        )
    splits = min(SPLITS, blocks)
    own = gradient.new_empty(splits, kinds, m, n, g, dtype=torch.float32)
    _kernels().heads_own[(splits, kinds * n)](
        _table(sources),
        gradient,
        own,
        size,
        SHARE=-(-blocks // splits) * COLUMNS,
        **_heads(weights, sources),
    )
    return own.sum((0, 1)), into


def blend_forward(value: Tensor, logits: Tensor, v1: Tensor, gate: str, out: Tensor) -> Tensor:
    """Value + gate(logits) v1, written into `out`.

    Args:
        value: [s, b, g, d], whose s and b may be one axis in memory, and d is the last there.
        logits: [s, b, g].
        v1: [s, b, g, d].
        gate: "relu", "sigmoid", "tanh" or "identity".
        out: [s, b, g, d], as value in memory; it may be value itself.

    Returns:
        out.
    """
    value, logits = value.flatten(0, 1), logits.flatten(0, 1)
    if value.stride(-1) != 1:
        value = value.contiguous()
    v1, written = v1.contiguous(), out.view(-1, *out.shape[2:])
    (tokens, heads, d), strides = value.shape, (*value.stride()[:2], *logits.stride())
    _kernels().blend_forward[_blocks_of_rows(tokens * heads)](
        value,
        logits,
        v1,
        written,
        *strides,
        *written.stride()[:2],
        tokens,
        G=heads,
        D=d,
        GATE=gate,
        **_rows(d),
    )
    return out


def blend_backward(
    logits: Tensor, v1: Tensor, gate: str, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `blend_forward` for logits and v1; that for value is the one given."""
    v1, gradient = v1.contiguous(), gradient.contiguous()
    into = torch.empty_like(v1)
    own = torch.empty_like(logits, memory_format=torch.contiguous_format)
    logits = logits.flatten(0, 1)
    (tokens, heads), d = logits.shape, v1.size(-1)
    _kernels().blend_backward[_blocks_of_rows(tokens * heads)](
        gradient,
        logits,
        v1,
        into,
        own,
        *logits.stride(),
        tokens,
        G=heads,
        D=d,
        GATE=gate,
        **_rows(d),
    )
    return own, into


def _blocks_of_rows(rows: int) -> tuple[int]:
    return (-(-rows // ROWS),)


def _rows(d: int) -> dict[str, int]:
    return {"BR": ROWS, "BD": padded(d), "num_warps": 4}


def _heads(weights: Tensor, *tables: Sequence[Tensor | None]) -> dict[str, Any]:
    m, n, g = weights.shape
    tensors = [x for table in tables for x in table if x is not None]
    return {
        "N": n,
        "M": m,
        "G": g,
        "BM": max(16, padded(m)),
        "BG": max(16, padded(g)),
        "BX": COLUMNS,
        "DTYPE": _kernels().TYPES[tensors[0].dtype],
        "ALIGNED": all(x.data_ptr() % 16 == 0 for x in tensors),
        # bf16 is exact in tf32, weights are not: three products keep what two leave out
        "PRECISION": "tf32x3",
        "num_warps": 4,
    }


def _tokens(x: Tensor) -> int:
    return x.numel() // x.size(-1)


def _blocks(k: int) -> dict[str, int]:
    return {"BT": TOKENS, "BD": WIDTH, "BK": max(16, padded(k)), "num_warps": 4}


def _sizes(m: int, *tables: Sequence[Tensor | None]) -> dict[str, Any]:
    tensors = [x for table in tables for x in table if x is not None]
    width, rows = padded(tensors[0].size(-1)), padded(m)
    return {
        "BD": width,
        "BM": rows,
        "DTYPE": _kernels().TYPES[tensors[0].dtype],
        "ALIGNED": all(x.data_ptr() % 16 == 0 for x in tensors),  # else loads are narrow
        "num_warps": min(16, max(2, width * rows // 1024)),
    }


def _by_token(weights: Tensor) -> tuple[Tensor, int, int, int]:
    """Weights and their strides over tokens, sums and sources."""
    token = 0
    if weights.dim() > 2:
        weights = weights.reshape(-1, *weights.shape[-2:])
        token = weights.stride(0)
    return weights, token, weights.stride(-2), weights.stride(-1)


def _table(tensors: Sequence[Tensor | None]) -> Tensor:
    """Their addresses, 0 for None, where the kernel runs; sent without waiting for it."""
    addresses = torch.tensor([0 if x is None else x.data_ptr() for x in tensors])
    device = next(x.device for x in tensors if x is not None)
    if device.type == "cpu":
        return addresses
    return addresses.pin_memory().to(device, non_blocking=True)
