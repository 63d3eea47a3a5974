"""Attention over runs of keys on a GPU: torch's flex_attention, without [s, s].

Its mask is given by blocks, from the first and last key of every query, by arithmetic alone:
torch's create_block_mask would write out a whole [s, s] first.

Shapes: s sequence, b micro-batch, np heads, ng KV heads, hn head dim, q queries of this rank.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128


@cache
def compiled_flex() -> Callable[..., Any]:
    """The fused kernel; what is not compiled writes out all scores."""
    return torch.compile(flex_attention, dynamic=False)


def attend_by_mask(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None, kernel: Any
) -> Tensor:
    """Attention under a mask from `build_mask`.

    Args:
        query: [q, b, np, hn].
        key: [s, b, ng, hn].
        value: [s, b, ng, hn].
        mask: of these queries and keys.
        scale: of the scores; None: 1 / sqrt(hn).
        kernel: `compiled_flex()`, or flex_attention itself.

    Returns:
        [q, b, np, hn].
    """
    gqa = query.size(2) != key.size(2)
    heads = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    out = kernel(*heads, block_mask=mask, scale=scale, enable_gqa=gqa)
    return out.permute(2, 0, 1, 3)


def build_mask(first: Tensor, last: Tensor, keys: int) -> BlockMask:
    """The mask under which every query reads one run of keys.

    Args:
        first: [b, q] or [1, q], of every query the first key.
        last: [q], the last.
        keys: s.
    """

    def reads(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = b if len(first) > 1 else torch.zeros_like(b)
        return (k >= first[row, q]) & (k <= last[q])

    lowest, highest_first = _of_blocks(first, "amin"), _of_blocks(first, "amax")  # [b, q / BLOCK]
    lowest_last, highest = (_of_blocks(last.unsqueeze(0), how) for how in ("amin", "amax"))
    start = torch.arange(0, keys, BLOCK, device=first.device)
    # Those between, of a block that lies in two chunks, are read by none: `reads` knows.
    some = (start + BLOCK > lowest.unsqueeze(-1)) & (start <= highest.unsqueeze(-1))
    every = start >= highest_first.unsqueeze(-1)
    every &= start + BLOCK - 1 <= lowest_last.unsqueeze(-1)
    partial, whole = (_listed(blocks.unsqueeze(1)) for blocks in (some & ~every, every))
    return BlockMask.from_kv_blocks(
        *partial,
        *whole,
        BLOCK_SIZE=BLOCK,
        mask_mod=reads,
        seq_lengths=(last.numel(), keys),
    )


def _of_blocks(each: Tensor, how: str) -> Tensor:
    """[n, q] -> [n, q / BLOCK], the last block filled up with its last."""
    missing = -each.size(1) % BLOCK
    each = torch.cat([each, each[:, -1:].expand(-1, missing)], dim=1)
    return getattr(torch, how)(each.unflatten(1, (-1, BLOCK)), dim=-1)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of a row are set, and their numbers first: [..., k] -> [...], [..., k]."""
    numbers = torch.argsort((~blocks).to(torch.int8), dim=-1, stable=True)
    return blocks.sum(-1, dtype=torch.int32), numbers.to(torch.int32).contiguous()
