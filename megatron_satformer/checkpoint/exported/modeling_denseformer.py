"""DenseFormer for Hugging Face transformers (arXiv 2402.02622).

    X_0 = embedding,  X_n = layer n of Y_{n-1}, residuals included
    Y_n = sum_j a_nj X_j,  over j <= n with j = n modulo dwa_dilation

for n that are multiples of dwa_period; else Y_n = X_n. The final norm reads Y_L. The cache is that
of a plain Transformer: X_j of the tokens at hand is all that a sum needs.

Shapes: b batch, s sequence, h hidden.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_denseformer import DenseFormerConfig
from .modeling_access import LearnedAccess
from .modeling_decoder import (
    DecoderAttention,
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderLayer,
    DecoderModel,
    DecoderPreTrainedModel,
)


class DenseFormerLayer(DecoderLayer):
    """Layer n, behind which stands Y_n; what is carried are X_0 .. X_n, [b, s, h] each."""

    def __init__(
        self, config: DenseFormerConfig, layer_idx: int, attention_class: type[DecoderAttention]
    ) -> None:
        super().__init__(config, layer_idx, attention_class)
        n = layer_idx + 1
        self.reads = range(n % config.dwa_dilation, n + 1, config.dwa_dilation)
        self.sums = n % config.dwa_period == 0
        if self.sums:
            self.depth_weights = nn.Parameter(torch.eye(len(self.reads))[-1])
            self.access = LearnedAccess([f"X{j}" for j in self.reads])

    def forward(self, hidden_states: Tensor, *carried: Tensor, **kwargs) -> tuple[Any, ...]:
        """Y_{n-1} -> Y_n [b, s, h], gates, attention weights, X_0 .. X_n. Sums are in float32."""
        n = self.self_attn.layer_idx
        history = self.self_attn.expect(carried, n + 1) if n else (hidden_states,)
        hidden_states, gates, weights = super().forward(hidden_states, **kwargs)
        history = (*history, hidden_states)
        if self.sums:
            read = [history[j].float() for j in self.reads]
            weights_of = self.access(self.depth_weights.float())
            terms = [a * x for a, x in zip(weights_of, read, strict=True)]
            hidden_states = sum(terms).to(hidden_states.dtype)
        return hidden_states, gates, weights, *history


class DenseFormerPreTrainedModel(DecoderPreTrainedModel):
    """What the models share: initialisation, as a plain Transformer."""

    config_class = DenseFormerConfig
    _no_split_modules: ClassVar[list[str]] = ["DenseFormerLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DenseFormerLayer) and module.sums:
            init.copy_(module.depth_weights, torch.eye(len(module.reads))[-1])


class DenseFormerModel(DenseFormerPreTrainedModel, DecoderModel):
    """DecoderModel whose layers hand on all that was made so far."""

    layer_class = DenseFormerLayer


class DenseFormerForCausalLM(DenseFormerPreTrainedModel, DecoderForCausalLM):
    """DenseFormerModel with its language-model head."""

    model_class = DenseFormerModel


class DenseFormerForSequenceClassification(
    DenseFormerPreTrainedModel, DecoderForSequenceClassification
):
    """DenseFormerModel with a score per label."""

    model_class = DenseFormerModel


__all__ = [
    "DenseFormerForCausalLM",
    "DenseFormerForSequenceClassification",
    "DenseFormerModel",
    "DenseFormerPreTrainedModel",
]
