"""Attention Residuals for Hugging Face transformers (arXiv 2603.15031).

    h = sum_j p_j b_j,  p = softmax_j(w . RMSNorm(b_j)),  the norm with a gain of its own

is what attention or MLP of a layer, or the final norm, reads. b_0 is the embedding, the others are
sums of what sublayers computed: over attnres_block_layers layers (None: an eighth of all), or in
the full form of one sublayer each. The cache is that of a plain Transformer: the sources of the
tokens at hand are all that a reader needs.

Shapes: b batch, s sequence, h hidden.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_attnres import AttnResConfig
from .modeling_access import LearnedAccess
from .modeling_decoder import (
    DecoderAttention,
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderLayer,
    DecoderModel,
    DecoderPreTrainedModel,
)


class DepthQuery(nn.Module):
    """What one reader reads of all sources."""

    def __init__(self, config: AttnResConfig) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(config.hidden_size))
        self.query = nn.Parameter(torch.empty(config.hidden_size))
        self.eps = config.rms_norm_eps
        self.access = LearnedAccess("b")

    def reset(self) -> None:
        """Values with which every source weighs the same."""
        init.ones_(self.gain)
        init.zeros_(self.query)

    def forward(self, sources: tuple[Tensor, ...]) -> Tensor:
        """Tensors [b, s, h] -> their weighted mean; weights and sum are in float32."""
        wide, weight = [x.float() for x in sources], self.gain.float() * self.query.float()
        norms = [torch.rsqrt(x.square().mean(-1) + self.eps) for x in wide]
        scores = [(x @ weight) * norm for x, norm in zip(wide, norms, strict=True)]
        weights = self.access(torch.stack(scores, dim=-1).softmax(-1))  # [b, s, sources]
        terms = [w.unsqueeze(-1) * x for w, x in zip(weights.unbind(-1), wide, strict=True)]
        total = sum(terms[1:], terms[0])
        return total.to(sources[0].dtype)


class AttnResLayer(DecoderLayer):
    """Layer of sources: hidden_states is the newest, what is carried are those that ended."""

    def __init__(
        self, config: AttnResConfig, layer_idx: int, attention_class: type[DecoderAttention]
    ) -> None:
        super().__init__(config, layer_idx, attention_class)
        self.attn_res, self.mlp_res = DepthQuery(config), DepthQuery(config)
        self.full = config.attnres_form == "full"
        size = config.attnres_block_layers or -(-config.num_hidden_layers // 8)
        self.begins = self.full or layer_idx % size == 0
        self.carried = 2 * layer_idx if self.full else -(-layer_idx // size)

    def forward(self, hidden_states: Tensor, *carried: Tensor, **kwargs) -> tuple[Any, ...]:
        """Newest source [b, s, h] -> the same, gates, attention weights, those that ended."""
        sources = (*self.self_attn.expect(carried, self.carried), hidden_states)
        normed = self.input_layernorm(self.attn_res(sources))
        output, gates, weights, _ = self.self_attn(normed, (), **kwargs)
        sources = self._add(sources, output, self.begins)
        output = self.mlp(self.post_attention_layernorm(self.mlp_res(sources)))
        *ended, newest = self._add(sources, output, self.full)
        return newest, gates, weights, *ended

    @staticmethod
    def _add(sources: tuple[Tensor, ...], output: Tensor, begins: bool) -> tuple[Tensor, ...]:
        """Sources with what a sublayer computed, as a new one or in the newest."""
        return (*sources, output) if begins else (*sources[:-1], sources[-1] + output)


class AttnResPreTrainedModel(DecoderPreTrainedModel):
    """What the models share: initialisation, as a plain Transformer."""

    config_class = AttnResConfig
    _no_split_modules: ClassVar[list[str]] = ["AttnResLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DepthQuery):
            module.reset()


class AttnResModel(AttnResPreTrainedModel, DecoderModel):
    """DecoderModel whose layers hand on sources; of these `output_hidden_states` has the newest."""

    layer_class = AttnResLayer

    def __init__(self, config: AttnResConfig) -> None:
        super().__init__(config)
        self.final_res = DepthQuery(config)
        self.post_init()

    def finish(self, hidden_states: Tensor, carried: tuple[Tensor, ...]) -> Tensor:
        """A last sum over all sources, [b, s, h]."""
        return self.final_res((*carried, hidden_states))


class AttnResForCausalLM(AttnResPreTrainedModel, DecoderForCausalLM):
    """AttnResModel with its language-model head."""

    model_class = AttnResModel


class AttnResForSequenceClassification(AttnResPreTrainedModel, DecoderForSequenceClassification):
    """AttnResModel with a score per label."""

    model_class = AttnResModel


__all__ = [
    "AttnResForCausalLM",
    "AttnResForSequenceClassification",
    "AttnResModel",
    "AttnResPreTrainedModel",
]
