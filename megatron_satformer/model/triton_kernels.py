"""The kernels themselves; see `kernels`, which alone imports this file, where Triton is.

Shapes: T tokens, D numbers each, N sources, M sums, K columns; B*: a program's block of them. What
is compiled serves any number of sources, so that deep models compile no more than shallow ones.
"""

import torch
import triton
import triton.language as tl

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _place(table, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    place = tl.load(table).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(place, 16) if ALIGNED else place


@triton.jit
def _rows(table, offset, M: tl.constexpr, D, BM: tl.constexpr, BD: tl.constexpr,
          DTYPE: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """Where one token of M tensors is, [BM, BD], and what of that exists."""
    i, d = tl.arange(0, BM), tl.arange(0, BD)
    places = tl.load(table + i, mask=i < M, other=0).to(tl.pointer_type(DTYPE))
    places = tl.multiple_of(places, [16]) if ALIGNED else places
    return places[:, None] + offset + d[None, :], (i < M)[:, None] & (d < D)[None, :]


@triton.jit
def mix_forward(sources, out, weights, wt, wm, wn, D, N, M: tl.constexpr,
                BM: tl.constexpr, BD: tl.constexpr, DTYPE: tl.constexpr,
                ALIGNED: tl.constexpr):  # fmt: skip
    """One token: M sums of N sources."""
    t = tl.program_id(0).to(tl.int64)
    i, d = tl.arange(0, BM), tl.arange(0, BD)
    total = tl.zeros([BM, BD], tl.float32)
    for j in range(N):
        source = _place(sources + j, DTYPE, ALIGNED) + t * D
        x = tl.load(source + d, mask=d < D, other=0.0).to(tl.float32)
        w = tl.load(weights + t * wt + i * wm + j * wn, mask=i < M, other=0.0).to(tl.float32)
        total += w[:, None] * x[None, :]
    places, there = _rows(out, t * D, M, D, BM, BD, DTYPE, ALIGNED)
    tl.store(places, total.to(DTYPE), mask=there)


@triton.jit
def mix_backward(sources, gradients, into, weights, wt, wm, wn, own, D, N,
                 M: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, DTYPE: tl.constexpr,
                 ALIGNED: tl.constexpr):  # fmt: skip
    """One token: gradients of its weights [M, N], and of the sources whose table entry is not 0."""
    t = tl.program_id(0).to(tl.int64)
    i, d = tl.arange(0, BM), tl.arange(0, BD)
    places, there = _rows(gradients, t * D, M, D, BM, BD, DTYPE, ALIGNED)
    g = tl.load(places, mask=there, other=0.0).to(tl.float32)
    for j in range(N):
        source = _place(sources + j, DTYPE, ALIGNED) + t * D
        x = tl.load(source + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(own + (t * M + i) * N + j, tl.sum(g * x[None, :], axis=1), mask=i < M)
        w = tl.load(weights + t * wt + i * wm + j * wn, mask=i < M, other=0.0).to(tl.float32)
        wanted = tl.load(into + j) != 0
        target = _place(into + j, DTYPE, ALIGNED) + t * D
        tl.store(target + d, tl.sum(g * w[:, None], axis=0).to(DTYPE), mask=(d < D) & wanted)


@triton.jit
def product_forward(x, weight, products, squares, T, K, j, N, D: tl.constexpr, BT: tl.constexpr,
                    BD: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """A block of tokens of source j of N: x @ weight, and the mean of x^2."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    k = tl.arange(0, BK)
    total, mean = tl.zeros([BT, BK], tl.float32), tl.zeros([BT], tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        there = (t < T)[:, None] & (d < D)[None, :]
        block = tl.load(x + t[:, None] * D + d[None, :], mask=there, other=0.0).to(tl.float32)
        known = (d < D)[:, None] & (k < K)[None, :]
        w = tl.load(weight + d[:, None] * K + k[None, :], mask=known, other=0.0).to(tl.float32)
        total += tl.dot(block, w, input_precision="ieee")
        mean += tl.sum(block * block, axis=1)
    there = (t < T)[:, None] & (k < K)[None, :]
    tl.store(products + (t[:, None] * N + j) * K + k[None, :], total, mask=there)
    tl.store(squares + t * N + j, mean / D, mask=t < T)


@triton.jit
def product_into(x, weight, products, squares, into, T, K, j, N, D: tl.constexpr,
                 BT: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """A block of tokens and of numbers of source j of N: the gradient of x."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    d, k = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, BK)
    known = (t < T)[:, None] & (k < K)[None, :]
    g = tl.load(products + (t[:, None] * N + j) * K + k[None, :], mask=known, other=0.0)
    known = (k < K)[:, None] & (d < D)[None, :]
    w = tl.load(weight + d[None, :] * K + k[:, None], mask=known, other=0.0).to(tl.float32)
    there = (t < T)[:, None] & (d < D)[None, :]
    places = t[:, None] * D + d[None, :]
    block = tl.load(x + places, mask=there, other=0.0).to(tl.float32)
    scale = tl.load(squares + t * N + j, mask=t < T, other=0.0) * (2.0 / D)
    out = tl.dot(g, w, input_precision="ieee") + block * scale[:, None]
    tl.store(into + places, out.to(into.dtype.element_ty), mask=there)


@triton.jit
def product_own(x, products, own, T, K, j, N, D: tl.constexpr, SHARE: tl.constexpr,
                BT: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """A share of the tokens of source j of N, a block of numbers: part of the weight's gradient."""
    first = tl.program_id(0).to(tl.int64) * SHARE
    d, k = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, BK)
    total = tl.zeros([BD, BK], tl.float32)
    for start in range(0, SHARE, BT):
        t = first + start + tl.arange(0, BT)
        there = (d < D)[:, None] & (t < T)[None, :]
        block = tl.load(x + t[None, :] * D + d[:, None], mask=there, other=0.0).to(tl.float32)
        known = (t < T)[:, None] & (k < K)[None, :]
        g = tl.load(products + (t[:, None] * N + j) * K + k[None, :], mask=known, other=0.0)
        total += tl.dot(block, g, input_precision="ieee")
    places = (tl.program_id(0) * D + d[:, None]) * K + k[None, :]
    tl.store(own + places, total, mask=(d < D)[:, None] & (k < K)[None, :])


@triton.jit
def heads_forward(sources, out, weights, X, N, M: tl.constexpr, G: tl.constexpr,
                  BM: tl.constexpr, BG: tl.constexpr, BX: tl.constexpr, DTYPE: tl.constexpr,
                  ALIGNED: tl.constexpr, PRECISION):  # fmt: skip
    """A block of X numbers of one kind: M sums over N sources of G heads; out [M, kinds, X]."""
    kind, kinds = tl.program_id(1), tl.num_programs(1)
    x = tl.program_id(0).to(tl.int64) * BX + tl.arange(0, BX)
    i, g = tl.arange(0, BM).to(tl.int64), tl.arange(0, BG).to(tl.int64)
    total = tl.zeros([BM, BX], tl.float32)
    for j in range(N):
        source = _place(sources + kind * N + j, DTYPE, ALIGNED)
        there = (g < G)[:, None] & (x < X)[None, :]
        block = tl.load(source + g[:, None] * X + x[None, :], mask=there, other=0.0).to(tl.float32)
        known = (i < M)[:, None] & (g < G)[None, :]
        w = tl.load(weights + (i[:, None] * N + j) * G + g[None, :], mask=known, other=0.0)
        total += tl.dot(w.to(tl.float32), block, input_precision=PRECISION)
    places = out + (i[:, None] * kinds + kind) * X + x[None, :]
    tl.store(places, total.to(DTYPE), mask=(i < M)[:, None] & (x < X)[None, :])


@triton.jit
def heads_into(into, gradient, weights, X, N, M: tl.constexpr, G: tl.constexpr,
               BM: tl.constexpr, BG: tl.constexpr, BX: tl.constexpr, DTYPE: tl.constexpr,
               ALIGNED: tl.constexpr, PRECISION):  # fmt: skip
    """A block of X numbers of one kind: gradients of the sources whose table entry is not 0."""
    kind, kinds = tl.program_id(1), tl.num_programs(1)
    x = tl.program_id(0).to(tl.int64) * BX + tl.arange(0, BX)
    i, g = tl.arange(0, BM).to(tl.int64), tl.arange(0, BG).to(tl.int64)
    there = (i < M)[:, None] & (x < X)[None, :]
    places = gradient + (i[:, None] * kinds + kind) * X + x[None, :]
    given = tl.load(places, mask=there, other=0.0).to(tl.float32)
    for j in range(N):
        wanted = tl.load(into + kind * N + j) != 0
        target = _place(into + kind * N + j, DTYPE, ALIGNED)
        known = (g < G)[:, None] & (i < M)[None, :]
        w = tl.load(weights + (i[None, :] * N + j) * G + g[:, None], mask=known, other=0.0)
        block = tl.dot(w.to(tl.float32), given, input_precision=PRECISION)
        whole = (g < G)[:, None] & (x < X)[None, :]
        tl.store(target + g[:, None] * X + x[None, :], block.to(DTYPE), mask=whole & wanted)


@triton.jit
def heads_own(sources, gradient, own, X, N, M: tl.constexpr, G: tl.constexpr,
              SHARE: tl.constexpr, BM: tl.constexpr, BG: tl.constexpr, BX: tl.constexpr,
              DTYPE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION):  # fmt: skip
    """A share of X for one source of one kind: part of the weights' gradient, [M, G]."""
    split, place = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kind, kinds = place // N, tl.num_programs(1) // N
    i, g = tl.arange(0, BM).to(tl.int64), tl.arange(0, BG).to(tl.int64)
    total = tl.zeros([BM, BG], tl.float32)
    source = _place(sources + place, DTYPE, ALIGNED)
    for start in range(0, SHARE, BX):
        x = split * SHARE + start + tl.arange(0, BX)
        there = (i < M)[:, None] & (x < X)[None, :]
        places = gradient + (i[:, None] * kinds + kind) * X + x[None, :]
        given = tl.load(places, mask=there, other=0.0).to(tl.float32)
        there = (x < X)[:, None] & (g < G)[None, :]
        block = tl.load(source + g[None, :] * X + x[:, None], mask=there, other=0.0)
        total += tl.dot(given, block.to(tl.float32), input_precision=PRECISION)
    places = own + (((split * kinds + kind) * M + i[:, None]) * N + place % N) * G + g[None, :]
    tl.store(places, total, mask=(i < M)[:, None] & (g < G)[None, :])


@triton.jit
def _gate(logit, GATE: tl.constexpr):
    """The gate's value, and its slope."""
    if GATE == "relu":
        return tl.maximum(logit, 0.0), tl.where(logit > 0, 1.0, 0.0)
    if GATE == "sigmoid":
        value = 1 / (1 + tl.exp(-logit))
        return value, value * (1 - value)
    if GATE == "tanh":
        value = 2 / (1 + tl.exp(-2 * logit)) - 1
        return value, 1 - value * value
    return logit, tl.full(logit.shape, 1.0, tl.float32)


@triton.jit
def blend_forward(value, logits, v1, out, vt, vg, lt, lg, ot, og, T, G: tl.constexpr,
                  D: tl.constexpr, GATE: tl.constexpr, BR: tl.constexpr,
                  BD: tl.constexpr):  # fmt: skip
    """A block of rows, one per token and head: value + gate(logit) v1."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    t, g, d = r // G, r % G, tl.arange(0, BD)
    there = (t < T)[:, None] & (d < D)[None, :]
    alpha, _ = _gate(tl.load(logits + t * lt + g * lg, mask=t < T, other=0.0).to(tl.float32), GATE)
    places = value + (t * vt + g * vg)[:, None] + d[None, :]
    own = tl.load(places, mask=there, other=0.0).to(tl.float32)
    first = tl.load(v1 + r[:, None] * D + d[None, :], mask=there, other=0.0).to(tl.float32)
    total = own + alpha[:, None] * first
    places = out + (t * ot + g * og)[:, None] + d[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=there)


@triton.jit
def blend_backward(gradient, logits, v1, into, own, lt, lg, T, G: tl.constexpr, D: tl.constexpr,
                   GATE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Gradients of v1 and of the logits; that of value is `gradient`."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    t, g, d = r // G, r % G, tl.arange(0, BD)
    there = (t < T)[:, None] & (d < D)[None, :]
    logit = tl.load(logits + t * lt + g * lg, mask=t < T, other=0.0).to(tl.float32)
    alpha, slope = _gate(logit, GATE)
    places = r[:, None] * D + d[None, :]
    given = tl.load(gradient + places, mask=there, other=0.0).to(tl.float32)
    first = tl.load(v1 + places, mask=there, other=0.0).to(tl.float32)
    tl.store(into + places, (alpha[:, None] * given).to(into.dtype.element_ty), mask=there)
    part = tl.sum(given * first, axis=1) * slope
    tl.store(own + r, part.to(own.dtype.element_ty), mask=t < T)
