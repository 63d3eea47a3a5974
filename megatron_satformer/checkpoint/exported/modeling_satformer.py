"""SATFormer for Hugging Face transformers (arXiv 2605.03953).

Per KV head g of layer n, x_n the normed input of attention::

    V_n  = W_v,n x_n                           V'_1 = V_1
    V'_n = V_n + gate(W_gate,n x_n) * V_1

V' is what attention reads and what the cache holds: decoding needs V_1 of the new tokens only,
which layer 1 has just made, so the cache is that of a plain Transformer.

Shapes: b batch, s sequence, h hidden, ng KV heads, hn head dim.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .configuration_satformer import SATFormerConfig
from .modeling_decoder import (
    SPLIT_HEADS,
    DecoderAttention,
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderModel,
)

# logits [b, s, ng] -> alpha [b, s, ng]; ng is the number of KV heads of the whole model
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softmax": lambda z: z.softmax(-1) * z.size(-1),
    "softmax_sigmoid": lambda z: z.softmax(-1) * z.sigmoid() * z.size(-1),
    "tanh": torch.tanh,
    "identity": lambda z: z,
}


class SATFormerAttention(DecoderAttention):
    """Attention whose values read V1 through one gate per token and KV head."""

    def __init__(self, config: SATFormerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mixes = layer_idx in config.mixing_layers
        if self.mixes:
            self.value_gate = nn.Linear(
                config.hidden_size, config.num_key_value_heads, bias=config.value_gate_bias
            )

    def mix(
        self, hidden_states: Tensor, k: Tensor, v: Tensor, carried: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor | None]:
        """The equation; what is carried is V1 [b, s, ng, hn], the gates are alpha [b, s, ng]."""
        if not self.mixes:
            return k, v, self.expect(carried, 1) if self.layer_idx else (v,), None
        (v1,) = self.expect(carried, 1)
        logits, gate = self.value_gate(hidden_states), self.config.value_gate
        if "softmax" in gate and v.size(-2) < self.config.num_key_value_heads:
            raise NotImplementedError(SPLIT_HEADS.format(f"value_gate ({gate})"))
        alpha = GATES[gate](logits)
        return k, torch.addcmul(v, alpha.unsqueeze(-1), v1), carried, alpha


class SATFormerModel(DecoderModel):
    """DecoderModel whose first layer hands its values to the others."""

    config_class = SATFormerConfig
    attention_class = SATFormerAttention


class SATFormerForCausalLM(DecoderForCausalLM):
    """SATFormerModel with its language-model head; `output_gates=True` gives alpha."""

    config_class = SATFormerConfig
    model_class = SATFormerModel


class SATFormerForSequenceClassification(DecoderForSequenceClassification):
    """SATFormerModel with a score per label."""

    config_class = SATFormerConfig
    model_class = SATFormerModel


__all__ = ["SATFormerForCausalLM", "SATFormerForSequenceClassification", "SATFormerModel"]
