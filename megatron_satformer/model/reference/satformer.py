"""SATFormer in torch alone (arXiv 2605.03953).

Per KV head g of layer n (1-based), with x_n the normed input of the attention of layer n::

    V_n   = W_v,n x_n,  V'_1 = V_1
    V'_n  = V_n + gate(W_gate,n x_n) * V_1

Shapes: b batch, s sequence, h hidden, ng KV heads, hn head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from megatron_satformer.model.reference.decoder import (
    Attention,
    Carried,
    Decoder,
    Shown,
    TwinConfig,
)
from megatron_satformer.model.reference.value_residual import ValueResidualTwinConfig

# logits [..., ng] -> alpha [..., ng]; ng is the number of KV heads of the whole model
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softmax": lambda z: z.softmax(-1) * z.size(-1),
    "softmax_sigmoid": lambda z: z.softmax(-1) * z.sigmoid() * z.size(-1),
    "tanh": torch.tanh,
    "identity": lambda z: z,
}


@dataclass
class SATFormerTwinConfig(ValueResidualTwinConfig):
    """ValueResidualTwinConfig with a gate."""

    value_gate: str = "relu"
    value_gate_bias: bool = False


class GatedAttention(Attention):
    """Attention whose values read V1 through one gate per token and KV head."""

    def __init__(self, config: SATFormerTwinConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.mixes = layer in config.mixing_layers
        if self.mixes:
            h, ng = config.hidden_size, config.num_key_value_heads
            self.value_gate = nn.Linear(h, ng, bias=config.value_gate_bias)

    def mix(
        self, x: Tensor, k: Tensor, v: Tensor, carried: Carried
    ) -> tuple[Tensor, Tensor, Carried, Shown]:
        """The equation; what is carried is V1 [b, s, ng, hn], what is shown alpha [b, s, ng]."""
        (v1,) = carried or (v,)
        if not self.mixes:
            return k, v, (v1,), None
        alpha = GATES[self.config.value_gate](self.value_gate(x))  # [b, s, ng]
        return k, v + alpha[..., None] * v1, (v1,), alpha


class SATFormer(Decoder):
    """The plain twin of --architecture satformer."""

    config_class: ClassVar[type[TwinConfig]] = SATFormerTwinConfig
    attention_class = GatedAttention
