"""Depth-Attention for Hugging Face transformers (arXiv 2606.05014).

    V'_n = sum_j w_j V'_j + w_n V_n    over j in J_n = {1, 1 + t, 1 + 2 t, ..}, j < n;  V'_1 = V_1
    w    = softmax over J_n and n of qbar_n . k_j / sqrt(hn)

per token and KV head; qbar_n is the mean of the head's queries, k_j the normed key, both without
RoPE. V' is what attention reads and what the cache holds: k_j and V'_j of the tokens at hand are
all that a sum needs, so the cache is that of a plain Transformer.

Shapes: b batch, s sequence, np query heads, ng KV heads, hn head dim.
"""

import torch
from torch import Tensor

from .configuration_depth_attention import DepthAttentionConfig
from .modeling_access import LearnedAccess, number_names
from .modeling_decoder import (
    DecoderAttention,
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderModel,
)


class DepthAttentionAttention(DecoderAttention):
    """Attention whose values are a softmax over depth of its own and earlier layers'."""

    def __init__(self, config: DepthAttentionConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        # here, because an early exit changes what the configuration says of its layers
        stride = config.source_stride
        self.is_source = layer_idx % stride == 0
        self.num_sources = -(-layer_idx // stride)
        if layer_idx:
            names = [f"V'{n + 1}" for n in range(0, layer_idx, stride)]
            self.access = LearnedAccess([*names, "own V"], number_names(config.num_key_value_heads))

    def mix_normed(
        self, q: Tensor, k: Tensor, v: Tensor, carried: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The equation; what is carried are k_j, V'_j [b, s, ng, hn] of each j in J_n."""
        carried = self.expect(carried, 2 * self.num_sources)
        if carried:
            qbar = q.unflatten(2, (k.size(2), -1)).mean(3).float()  # [b, s, ng, hn]
            scores = [(qbar * key.float()).sum(-1) for key in (*carried[0::2], k)]
            weights = (torch.stack(scores) * self.scaling).softmax(0)  # [sources, b, s, ng]
            weights = self.access(weights.movedim(0, -1)).unsqueeze(-1)
            pairs = zip(weights.unbind(-2), (*carried[1::2], v), strict=True)
            first, *others = (weight * value.float() for weight, value in pairs)
            v = sum(others, first).to(v.dtype)
        return v, (*carried, k, v) if self.is_source else carried


class DepthAttentionModel(DecoderModel):
    """DecoderModel whose layers hand on keys and values of those that are read."""

    config_class = DepthAttentionConfig
    attention_class = DepthAttentionAttention


class DepthAttentionForCausalLM(DecoderForCausalLM):
    """DepthAttentionModel with its language-model head."""

    config_class = DepthAttentionConfig
    model_class = DepthAttentionModel


class DepthAttentionForSequenceClassification(DecoderForSequenceClassification):
    """DepthAttentionModel with a score per label."""

    config_class = DepthAttentionConfig
    model_class = DepthAttentionModel


__all__ = [
    "DepthAttentionForCausalLM",
    "DepthAttentionForSequenceClassification",
    "DepthAttentionModel",
]
