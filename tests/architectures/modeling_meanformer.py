"""MeanFormer for Hugging Face transformers; see meanformer.py."""

from typing import ClassVar

import torch
from torch import nn
from transformers import initialization as init

from megatron_satformer.checkpoint.exported.configuration_decoder import DecoderConfig
from megatron_satformer.checkpoint.exported.modeling_access import LearnedAccess
from megatron_satformer.checkpoint.exported.modeling_decoder import (
    DecoderAttention,
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderLayer,
    DecoderModel,
    DecoderPreTrainedModel,
)


class MeanFormerConfig(DecoderConfig):
    """DecoderConfig with the factor of the mean."""

    model_type = "meanformer"

    architecture: str = "meanformer"
    mean_scale: float = 1.0


class MeanFormerAttention(DecoderAttention):
    """Attention that reads earlier values."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        if layer_idx:
            self.beta = nn.Parameter(torch.full((1,), 0.3))
            self.access = LearnedAccess(["mean V"])

    def mix(self, hidden_states, k, v, carried):
        embedding, *values = self.expect(carried, 1 + self.layer_idx)
        mixed = v
        if values:
            mean = torch.stack(values).mean(0)
            beta = self.access(self.beta.float())
            mixed = (v + self.config.mean_scale * beta * mean).to(v.dtype)
        return k, mixed, (embedding, *values, v), None


class MeanFormerLayer(DecoderLayer):
    """Layer that reads the embedding."""

    def __init__(self, config, layer_idx, attention_class):
        super().__init__(config, layer_idx, attention_class)
        if layer_idx:
            self.skip = nn.Parameter(torch.full((1,), 0.3))

    def forward(self, hidden_states, *carried, **kwargs):
        if carried:
            added = (hidden_states + self.skip.float() * carried[0]).to(hidden_states.dtype)
            return super().forward(added, *carried, **kwargs)
        return super().forward(hidden_states, hidden_states, **kwargs)


class MeanFormerPreTrainedModel(DecoderPreTrainedModel):
    """What the models share."""

    config_class = MeanFormerConfig
    _no_split_modules: ClassVar[list[str]] = ["MeanFormerLayer"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        for name in ("beta", "skip"):
            if isinstance(weight := getattr(module, name, None), nn.Parameter):
                init.constant_(weight, 0.3)


class MeanFormerModel(MeanFormerPreTrainedModel, DecoderModel):
    """The decoder without its head."""

    attention_class = MeanFormerAttention
    layer_class = MeanFormerLayer


class MeanFormerForCausalLM(MeanFormerPreTrainedModel, DecoderForCausalLM):
    """The decoder with its head."""

    model_class = MeanFormerModel


class MeanFormerForSequenceClassification(
    MeanFormerPreTrainedModel, DecoderForSequenceClassification
):
    """The decoder with a score per label."""

    model_class = MeanFormerModel
