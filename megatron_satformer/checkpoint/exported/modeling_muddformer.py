"""MUDDFormer for Hugging Face transformers (arXiv 2502.12170).

    X_0 = embedding,  X_n = output of layer n, residuals included
    A_n = GELU(RMSNorm(X_n) W1_n) W2_n + a_n        per token; the norm has no gain
    X^c_n = sum_j A^c_nj X_j,  over j <= n          c = q, k, v, r; behind the last layer r alone

Layer n + 1 adds attention, of the normed X^q_n, X^k_n and X^v_n, to X^r_n; layer 1 reads X_0 in all
four ways, with one norm. With mudd_prepost_norm

    X^c_n = RMSNorm(sum_j A^c_nj RMSNorm(X_j)) + X_n

The cache is that of a plain Transformer: X_j of the tokens at hand is all that a sum needs.

Shapes: b batch, s sequence, h hidden, C ways.
"""

from copy import copy
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from .configuration_muddformer import MuddFormerConfig
from .modeling_access import LearnedAccess
from .modeling_decoder import (
    DecoderAttention,
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderLayer,
    DecoderModel,
    DecoderPreTrainedModel,
)


def rms_normed(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without gain over the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def mlp_width(config: MuddFormerConfig, layer_idx: int) -> int:
    """Of the MLP of a layer, from 0, with mudd_ffn_realloc."""
    last, base = config.num_hidden_layers - 1, config.intermediate_size
    if config.mudd_form == "baseline":
        share = (0.5 * (last - layer_idx) + 1.5 * layer_idx) / last
        return 256 * max(1, (round(share * base) + 127) // 256)
    return 128 * max(1, round((0.5 + layer_idx / last) * base / 128))


class MuddFormerAggregate(nn.Module):
    """X_0 .. X_n -> X^c_n of C ways, [b, s, h] each, computed in float32."""

    def __init__(self, config: MuddFormerConfig, ways: int, sources: int) -> None:
        super().__init__()
        self.ways, self.sources = ways, sources
        self.eps, self.normed = config.rms_norm_eps, config.mudd_prepost_norm
        self.access = LearnedAccess(
            [f"X{n}" for n in range(sources)], list("qkvr") if ways > 1 else ["r"]
        )
        size, h = ways * sources, config.hidden_size
        width = size
        if config.mudd_form == "released":  # behind the last layer there is one way
            width = ((size if ways > 1 else 4 * size) // 64 + 1) * 64
        self.w1 = nn.Parameter(torch.randn(width, h) * h**-0.5)
        self.w2 = nn.Parameter(torch.zeros(size, width))
        self.static = nn.Parameter(torch.zeros(size))
        if self.normed:
            self.pre_gains = nn.Parameter(torch.ones(sources * h))
            self.post_gains = nn.Parameter(torch.full((ways * h,), 1e-3))

    def forward(self, history: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The equation."""
        read = torch.stack([x.float() for x in history], dim=-2)  # [b, s, n + 1, h]
        newest = read[..., -1, :]
        weights = F.gelu(F.linear(rms_normed(newest, self.eps), self.w1.float()))
        weights = F.linear(weights, self.w2.float(), self.static.float())
        if self.normed:
            gains = self.pre_gains.float().view(self.sources, -1)
            read = rms_normed(read, self.eps) * gains
        weights = self.access(weights.unflatten(-1, (self.ways, self.sources)))
        sums = weights @ read  # [b, s, C, h]
        if self.normed:
            gains = self.post_gains.float().view(self.ways, -1)
            sums = rms_normed(sums, self.eps) * gains + newest.unsqueeze(-2)
        return sums.to(history[-1].dtype).unbind(-2)


class MuddFormerLayer(DecoderLayer):
    """Layer n, behind which stand the X^c_n; what is carried are q, k and v, and X_0 .. X_n."""

    def __init__(
        self, config: MuddFormerConfig, layer_idx: int, attention_class: type[DecoderAttention]
    ) -> None:
        super().__init__(config, layer_idx, attention_class)
        h, layers = config.hidden_size, config.num_hidden_layers
        if config.mudd_ffn_realloc:
            resized = copy(config)
            resized.intermediate_size = mlp_width(config, layer_idx)
            self.mlp = LlamaMLP(resized)
        self.ways = layer_idx > 0 or config.mudd_form == "baseline"
        if self.ways:
            self.input_layernorm_k = LlamaRMSNorm(h, eps=config.rms_norm_eps)
            self.input_layernorm_v = LlamaRMSNorm(h, eps=config.rms_norm_eps)
        ways = 1 if layer_idx == layers - 1 else 4
        self.aggregate = MuddFormerAggregate(config, ways, layer_idx + 2)

    def norm_inputs(self, hidden_states: Tensor, carried: tuple[Tensor, ...]) -> Any:
        """Of q, k and v; in the first layer all are the embedding, with one norm or three."""
        if not self.ways:
            return super().norm_inputs(hidden_states, carried)
        q, k, v = carried[:3] or (hidden_states,) * 3
        return self.input_layernorm(q), self.input_layernorm_k(k), self.input_layernorm_v(v)

    def forward(self, hidden_states: Tensor, *carried: Tensor, **kwargs) -> tuple[Any, ...]:
        """X^r_{n-1} -> X^r_n [b, s, h], gates, attention weights, q, k, v, X_0 .. X_n."""
        n = self.self_attn.layer_idx
        history = self.self_attn.expect(carried, n + 4)[3:] if n else (hidden_states,)
        hidden_states, gates, weights, *_ = super().forward(hidden_states, *carried, **kwargs)
        history = (*history, hidden_states)
        *ways, hidden_states = self.aggregate(history)
        return hidden_states, gates, weights, *ways, *history


class MuddFormerPreTrainedModel(DecoderPreTrainedModel):
    """What the models share: initialisation, as a plain Transformer."""

    config_class = MuddFormerConfig
    _no_split_modules: ClassVar[list[str]] = ["MuddFormerLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MuddFormerAggregate):
            init.normal_(module.w1, std=module.w1.shape[1] ** -0.5)
            init.zeros_(module.w2)
            init.zeros_(module.static)
            if module.normed:
                init.ones_(module.pre_gains)
                init.constant_(module.post_gains, 1e-3)
            else:
                own = torch.eye(module.static.numel() // module.ways)[-1]
                init.copy_(module.static, own.repeat(module.ways))


class MuddFormerModel(MuddFormerPreTrainedModel, DecoderModel):
    """DecoderModel whose layers hand on all that was made so far."""

    layer_class = MuddFormerLayer


class MuddFormerForCausalLM(MuddFormerPreTrainedModel, DecoderForCausalLM):
    """MuddFormerModel with its language-model head."""

    model_class = MuddFormerModel


class MuddFormerForSequenceClassification(
    MuddFormerPreTrainedModel, DecoderForSequenceClassification
):
    """MuddFormerModel with a score per label."""

    model_class = MuddFormerModel


__all__ = [
    "MuddFormerForCausalLM",
    "MuddFormerForSequenceClassification",
    "MuddFormerModel",
    "MuddFormerPreTrainedModel",
]
