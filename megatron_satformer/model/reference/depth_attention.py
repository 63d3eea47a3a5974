"""Depth-Attention in torch alone (arXiv 2606.05014).

    V'_n = sum_j w_j V'_j + w_n V_n    over j in J_n = {1, 1 + t, 1 + 2 t, ..}, j < n;  V'_1 = V_1
    w    = softmax over J_n and n of qbar_n . k_j / sqrt(hn)

per token and KV head; qbar_n is the mean of the head's queries, k_j the normed key, both without
RoPE.

Shapes: b batch, s sequence, np query heads, ng KV heads, hn head dim.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_satformer.model.reference.decoder import (
    Attention,
    Carried,
    Decoder,
    TwinConfig,
)


@dataclass
class DepthAttentionTwinConfig(TwinConfig):
    """TwinConfig with a stride."""

    depth_attention_stride: int | None = None  # None: half of num_hidden_layers


class DepthMixingAttention(Attention):
    """Attention whose values are a softmax over depth of its own and earlier layers'."""

    def mix_normed(
        self, q: Tensor, k: Tensor, v: Tensor, carried: Carried
    ) -> tuple[Tensor, Carried]:
        """The equation; what is carried are k_j, V'_j [b, s, ng, hn] of each j in J_n."""
        qbar = q.unflatten(2, (k.size(2), -1)).mean(3)  # [b, s, ng, hn]
        keys, values = torch.stack((*carried[0::2], k)), torch.stack((*carried[1::2], v))
        w = ((qbar * keys).sum(-1) * k.size(-1) ** -0.5).softmax(0)  # [sources + 1, b, s, ng]
        v = (w[..., None] * values).sum(0)
        stride = self.config.depth_attention_stride or self.config.num_hidden_layers // 2
        return v, (*carried, k, v) if self.layer % stride == 0 else carried


class DepthAttention(Decoder):
    """The plain twin of --architecture depth_attention."""

    config_class: ClassVar[type[TwinConfig]] = DepthAttentionTwinConfig
    attention_class = DepthMixingAttention
