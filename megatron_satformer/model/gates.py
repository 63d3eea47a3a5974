"""alpha = gate(logits): one scalar per token and KV head.

Shapes: s sequence, b micro-batch, ng KV heads of the model; "/tp" marks what a rank holds.
"""

import torch
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup


def apply_gate(logits: Tensor, gate: str, tp_group: ProcessGroup) -> Tensor:
    """Turn gate logits into alpha.

    The softmax forms run over all KV heads of the model, scaled by their number. Under tensor
    parallelism that costs one all-gather of [s, b, ng] forward and its reduce-scatter backward;
    the others need no communication.

    Args:
        logits: [s, b, ng/tp].
        gate: one of `config.VALUE_GATES`.
        tp_group: tensor-parallel group over which the KV heads are sharded.

    Returns:
        alpha, [s, b, ng/tp], in the dtype of `logits`.

    Source: arXiv 2605.03953, section on gate functions.
    """
    if gate == "relu":
        return torch.relu(logits)  # >= 0; half of them exactly 0 at init
    if gate == "sigmoid":
        return torch.sigmoid(logits)  # (0, 1)
    if gate == "tanh":
        return torch.tanh(logits)  # (-1, 1)
    if gate == "identity":
        return logits
    share = _softmax_over_heads(logits.float(), tp_group)  # mean 1 over heads
    if gate == "softmax_sigmoid":
        share = share * torch.sigmoid(logits.float())
    return share.to(logits.dtype)


def _softmax_over_heads(logits: Tensor, tp_group: ProcessGroup) -> Tensor:
    """Softmax over all ng heads times ng. [s, b, ng/tp] -> [s, b, ng/tp]."""
    every = all_gather_last_dim_from_tensor_parallel_region(logits, group=tp_group)  # [s, b, ng]
    heads = logits.size(-1)
    mine = tp_group.rank() * heads
    return every.softmax(dim=-1)[..., mine : mine + heads] * every.size(-1)
