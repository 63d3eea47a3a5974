"""K and V of all context-parallel ranks, in the order of the sequence, and their gradients back.

Shapes: s sequence, b micro-batch, ng KV heads, hn head dim; "/cp": per context-parallel rank.
"""

from typing import Any

import torch
from torch import Tensor


def gather_context(local: Tensor, group: Any) -> Tensor:
    """All-gather along the sequence, undoing Megatron's zigzag.

    Args:
        local: [n, s/cp, ...], chunks r and 2 cp - 1 - r of 2 cp.
        group: context-parallel.

    Returns:
        [n, s, ...].
    """
    # gloo wants the ranks' parts one behind the other.
    whole = local.new_empty((group.size() * len(local), *local.shape[1:]))
    torch.distributed.all_gather_into_tensor(whole, local.contiguous(), group=group)
    early, late = whole.view(group.size(), *local.shape).chunk(2, dim=2)
    return torch.cat([*early.unbind(0), *reversed(late.unbind(0))], dim=1)


def scatter_context(whole: Tensor, group: Any) -> Tensor:
    """Reduce-scatter, the transpose of `gather_context`: [n, s, ...] -> [n, s/cp, ...]."""
    ranks = group.size()
    chunks = whole.chunk(2 * ranks, dim=1)
    parts = [torch.cat([chunks[r], chunks[2 * ranks - 1 - r]], dim=1) for r in range(ranks)]
    mine = torch.empty_like(parts[0])
    torch.distributed.reduce_scatter_tensor(mine, torch.cat(parts), group=group)
    return mine


class GatherContext(torch.autograd.Function):
    """`gather_context`, with `scatter_context` for its gradient."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: Any) -> Tensor:
        """As gather_context's."""
        ctx.group = group
        return gather_context(local, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """As scatter_context's."""
        return scatter_context(gradient, ctx.group), None
