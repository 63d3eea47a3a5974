"""SATFormer for Hugging Face transformers (arXiv 2605.03953).

Per KV head g of layer n, x_n the normed input of attention::

    V_n  = W_v,n x_n                           V'_1 = V_1
    V'_n = V_n + alpha_n * V_1,                alpha_n = offset + gate(W_gate,n x_n)

or, where the gate is convex (lerp, lerp_channels), V'_n = (1 - alpha_n) V_n + alpha_n V_1.

V' is what attention reads and what the cache holds: decoding needs V_1 of the new tokens only,
which layer 1 has just made, so the cache is that of a plain Transformer.

Shapes: b batch, s sequence, h hidden, ng KV heads, hn head dim.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_satformer import SATFormerConfig
from .modeling_access import LearnedAccess, number_names
from .modeling_decoder import (
    SPLIT_HEADS,
    DecoderAttention,
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderModel,
    DecoderPreTrainedModel,
)

# logits [b, s, ng] -> alpha [b, s, ng]; ng is the number of KV heads of the whole model
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softmax": lambda z: z.softmax(-1) * z.size(-1),
    "softmax_sigmoid": lambda z: z.softmax(-1) * z.sigmoid() * z.size(-1),
    "tanh": torch.tanh,
    "identity": lambda z: z,
    "softplus": F.softplus,
    "leaky_relu": F.leaky_relu,
    "lerp": torch.sigmoid,
}


class SATFormerAttention(DecoderAttention):
    """Attention whose values read V1 through one gate per token and KV head."""

    def __init__(self, config: SATFormerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mixes = layer_idx in config.mixing_layers
        h, ng = config.hidden_size, config.num_key_value_heads
        if not self.mixes:
            return
        closed = 0.5 if config.value_gate == "relu" and not config.value_gate_offset else 0.0
        channels = self.head_dim if config.value_gate == "lerp_channels" else 1
        self.access = LearnedAccess(["V1"] * channels, number_names(ng), gate=True, zeros=closed)
        if config.value_gate == "constant":
            self.value_alpha = nn.Parameter(torch.zeros(ng))
        elif config.value_gate == "lerp_channels":
            self.value_gate_down = nn.Linear(h, config.gate_rank, bias=False)
            self.value_gate_up = nn.Linear(config.gate_rank, ng * self.head_dim)
        else:
            self.value_gate = nn.Linear(h, ng, bias=config.value_gate_bias)

    def mix(
        self, hidden_states: Tensor, k: Tensor, v: Tensor, carried: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor | None]:
        """The equation; what is carried is V1 [b, s, ng, hn], the gates are alpha [b, s, ng]."""
        if not self.mixes:
            return k, v, self.expect(carried, 1) if self.layer_idx else (v,), None
        (v1,) = self.expect(carried, 1)
        alpha = self.access(self._alpha(hidden_states, v))
        shown = alpha.mean(-1)
        if self.config.is_convex:
            return k, torch.lerp(v, v1, alpha.expand_as(v)), carried, shown
        return k, torch.addcmul(v, alpha, v1), carried, shown

    def _alpha(self, hidden_states: Tensor, v: Tensor) -> Tensor:
        """[b, s, ng, 1], or per channel [b, s, ng, hn]."""
        gate = self.config.value_gate
        if gate == "lerp_channels":
            z = self.value_gate_up(self.value_gate_down(hidden_states))
            return torch.sigmoid(z).unflatten(-1, (-1, self.head_dim))
        needs_all = "softmax" in gate or gate == "constant"
        if needs_all and v.size(-2) < self.config.num_key_value_heads:
            raise NotImplementedError(SPLIT_HEADS.format(f"value_gate ({gate})"))
        if gate == "constant":
            return self.value_alpha.to(v.dtype).expand(*v.shape[:2], -1).unsqueeze(-1)
        alpha = GATES[gate](self.value_gate(hidden_states)).unsqueeze(-1)
        return alpha + self.config.value_gate_offset if self.config.value_gate_offset else alpha


class SATFormerPreTrainedModel(DecoderPreTrainedModel):
    """What the models share: initialisation."""

    config_class = SATFormerConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "value_alpha"):
            init.zeros_(module.value_alpha)


class SATFormerModel(SATFormerPreTrainedModel, DecoderModel):
    """DecoderModel whose first layer hands its values to the others."""

    attention_class = SATFormerAttention


class SATFormerForCausalLM(SATFormerPreTrainedModel, DecoderForCausalLM):
    """SATFormerModel with its language-model head; `output_gates=True` gives alpha."""

    model_class = SATFormerModel


class SATFormerForSequenceClassification(
    SATFormerPreTrainedModel, DecoderForSequenceClassification
):
    """SATFormerModel with a score per label."""

    model_class = SATFormerModel


__all__ = [
    "SATFormerForCausalLM",
    "SATFormerForSequenceClassification",
    "SATFormerModel",
    "SATFormerPreTrainedModel",
]
