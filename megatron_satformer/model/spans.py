"""Attention over spans on the CPU: torch's flash kernel, call by call, exact, without [s, s].

A span of queries reads what lies before it and itself in two calls, merged by their log-sum-exp;
the kernel's backward takes the merged output and log-sum-exp, as ring attention does. Where a
window counts, a call reads a band of keys under a mask as large as a block. Under context
parallelism K and V are gathered once more for backward, so that a rank holds its own alone.

Shapes: s sequence, b micro-batch, np heads, ng KV heads, hn head dim, q queries of this rank.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_satformer.model.context import gather_context, scatter_context
from megatron_satformer.model.packing import Span

BLOCK = 256  # queries that share a window's mask


class _Call(NamedTuple):
    """One call of the kernel: which keys, how masked."""

    keys: slice
    causal: bool
    mask: Tensor | None


def attend_spans(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: list[Span],
    window: int | None,
    scale: float | None,
    cp_group: Any = None,
) -> Tensor:
    """Causal attention of every span.

    Args:
        query: [q, b, np, hn].
        key: [q, b, ng, hn].
        value: [q, b, ng, hn].
        spans: cut with `BLOCK`; all of this rank's queries.
        window: as they were cut for.
        scale: of the scores; None: 1 / sqrt(hn).
        cp_group: the ranks that hold the rest of the sequence.

    Returns:
        [q, b, np, hn].
    """
    return _SpanAttention.apply(query, key, value, spans, window, scale, cp_group)


class _SpanAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spans: list[Span],
        window: int | None,
        scale: float | None,
        cp_group: Any,
    ) -> Tensor:
        ctx.spans, ctx.window, ctx.scale, ctx.cp_group = spans, window, scale, cp_group
        keys, values = _whole(key, value, cp_group)
        queries = _by_head(query)
        out = torch.empty_like(query)
        sums = query.new_empty(queries.shape[:3], dtype=torch.float32)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        for span, at, calls in _plan(spans, window, query):
            parts = [
                flash(
                    queries[at],
                    keys[span.batch, :, call.keys],
                    values[span.batch, :, call.keys],
                    0.0,
                    call.causal,
                    attn_mask=call.mask,
                    scale=scale,
                )
                for call in calls
            ]
            part, sum_ = parts[0]
            if len(parts) == 2:
                sum_ = torch.logaddexp(*(each for _, each in parts))
                part = sum(o * torch.exp(each - sum_).unsqueeze(-1) for o, each in parts)
            _by_head(out)[at] = part.to(out.dtype)
            sums[at] = sum_
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sums = ctx.saved_tensors
        keys, values = _whole(key, value, ctx.cp_group)
        queries, outs, gradients = (_by_head(t) for t in (query, out, gradient))
        d_query = torch.zeros_like(query)
        # Spans of one document add to the same keys: in fp32, as within a kernel.
        d_whole = key.new_zeros((2, keys.size(2), *key.shape[1:]), dtype=torch.float32)
        d_keys, d_values = (_by_head(t) for t in d_whole.unbind(0))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        for span, at, calls in _plan(ctx.spans, ctx.window, query):
            for call in calls:
                read = (span.batch, slice(None), call.keys)
                d_q, d_k, d_v = flash(
                    gradients[at],
                    queries[at],
                    keys[read],
                    values[read],
                    outs[at],
                    sums[at],
                    0.0,
                    call.causal,
                    attn_mask=call.mask,
                    scale=ctx.scale,
                )
                _by_head(d_query)[at] += d_q
                d_keys[read] += d_k
                d_values[read] += d_v
        d_whole = d_whole.to(key.dtype)
        if ctx.cp_group is not None:
            d_whole = scatter_context(d_whole, ctx.cp_group)
        return d_query, *d_whole.unbind(0), None, None, None, None


def _plan(
    spans: list[Span], window: int | None, query: Tensor
) -> Iterator[tuple[Span, tuple[slice, ...], list[_Call]]]:
    """Every span, where its queries lie in [b, np, q, hn], and its calls."""
    band = None
    if window is not None and any(span.windowed for span in spans):
        row, column = torch.arange(BLOCK).unsqueeze(1), torch.arange(BLOCK + window)
        hidden = (column < row) | (column > row + window)  # column 0 is the key `window` before
        band = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, float("-inf"))
    for span in spans:
        length = span.stop - span.start
        at = (span.batch, slice(None), slice(span.at, span.at + length))
        if span.windowed:
            assert band is not None
            assert window is not None
            unread = span.first - (span.start - window)
            mask = band[:length, unread : window + length]
            calls = [_Call(slice(span.first, span.stop), False, mask)]
        else:
            calls = [_Call(slice(span.start, span.stop), True, None)]
            if span.first < span.start:
                calls.append(_Call(slice(span.first, span.start), False, None))
        yield span, at, calls


def _whole(key: Tensor, value: Tensor, cp_group: Any) -> tuple[Tensor, Tensor]:
    """K and V of the whole sequence, [b, ng, s, hn]."""
    if cp_group is not None:
        key, value = gather_context(torch.stack([key, value]), cp_group).unbind(0)
    return _by_head(key), _by_head(value)


def _by_head(tensor: Tensor) -> Tensor:
    """[s, b, n, hn] -> [b, n, s, hn], a view."""
    return tensor.permute(1, 2, 0, 3)
