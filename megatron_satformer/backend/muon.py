"""What Megatron's Muon (0.19.2) needs to take this project's matrices for what they are.

It orthogonalises a matrix as a whole, and linear_qkv as queries, keys and values, which it finds by
dividing the rows into groups of heads. SATFormer's linear_qkv has gate rows and padding behind
them: they are a matrix of their own, and padding stays 0.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.optimizer import emerging_optimizers
from torch import Tensor


def activate() -> None:
    """Let Muon know fused weights; once per process, a second call changes nothing."""
    if emerging_optimizers.HAVE_EMERGING_OPTIMIZERS:
        entry = emerging_optimizers._EMERGING_OPTIMIZERS["muon"]
        emerging_optimizers._EMERGING_OPTIMIZERS["muon"] = replace(entry, optimizer_cls=_Muon)


class _Muon(emerging_optimizers.TensorParallelMuon):
    # TensorParallelMuon.orthogonalize, 0.19.2, per piece of a fused weight, whose attribute
    # `qkv_split_shapes` (which Megatron hands to fp32 copies) is a tuple and not Megatron's list:
    # rows of q/k/v, gate and padding; rows of q, k and v in each group of heads.
    def orthogonalize(self, p: Tensor, grad: Tensor, **kwargs: Any) -> Tensor:
        rows = getattr(p, "qkv_split_shapes", None)
        if not isinstance(rows, tuple):
            return super().orthogonalize(p, grad, **kwargs)
        counts, shapes = rows
        qkv, gate, padding = grad.split(counts)
        where = {"partition_dim": getattr(p, "partition_dim", -1)}
        as_qkv = SimpleNamespace(is_qkv=True, qkv_split_shapes=[*shapes], **where)
        pieces = [
            super().orthogonalize(as_qkv, qkv, **kwargs),
            super().orthogonalize(SimpleNamespace(is_qkv=False, **where), gate, **kwargs),
            torch.zeros_like(padding),
        ]
        return torch.cat(pieces)
