"""SATFormer in torch alone (arXiv 2605.03953).

Per KV head g of layer n (1-based), with x_n the normed input of the attention of layer n::

    V_n   = W_v,n x_n,  V'_1 = V_1
    V'_n  = V_n + alpha_n * V_1,  alpha_n = offset + gate(W_gate,n x_n)

or, where the gate is convex (lerp, lerp_channels), V'_n = (1 - alpha_n) V_n + alpha_n V_1.

Shapes: b batch, s sequence, h hidden, ng KV heads, hn head dim, r rank of a low-rank map.
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
    "softplus": lambda z: (1 + z.exp()).log(),
    "leaky_relu": lambda z: torch.maximum(z, 0.01 * z),
    "lerp": torch.sigmoid,
}
CONVEX = ("lerp", "lerp_channels")


@dataclass
class SATFormerTwinConfig(ValueResidualTwinConfig):
    """ValueResidualTwinConfig with a gate."""

    value_gate: str = "relu"
    value_gate_bias: bool = False
    value_gate_offset: float = 0.0
    value_gate_rank: int | None = None  # r; None: RWKV-7's


class GatedAttention(Attention):
    """Attention whose values read V1 through one gate per token and KV head."""

    def __init__(self, config: SATFormerTwinConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.mixes = layer in config.mixing_layers
        h, ng = config.hidden_size, config.num_key_value_heads
        if not self.mixes:
            return
        if config.value_gate == "constant":
            self.value_alpha = nn.Parameter(torch.zeros(ng))
        elif config.value_gate == "lerp_channels":
            r = config.value_gate_rank or max(32, round(1.3 * h**0.5 / 32) * 32)
            self.value_gate_down = nn.Linear(h, r, bias=False)
            self.value_gate_up = nn.Linear(r, ng * config.head_dim)
        else:
            self.value_gate = nn.Linear(h, ng, bias=config.value_gate_bias)

    def alpha(self, x: Tensor) -> Tensor:
        """Of x [b, s, h]: [b, s, ng, 1], or per channel [b, s, ng, hn]."""
        gate = self.config.value_gate
        if gate == "constant":
            return self.value_alpha.expand(*x.shape[:2], -1)[..., None]
        if gate == "lerp_channels":
            z = self.value_gate_up(self.value_gate_down(x))  # [b, s, ng hn]
            return torch.sigmoid(z).unflatten(-1, (-1, self.config.head_dim))
        return self.config.value_gate_offset + GATES[gate](self.value_gate(x))[..., None]

    def mix(
        self, x: Tensor, k: Tensor, v: Tensor, carried: Carried
    ) -> tuple[Tensor, Tensor, Carried, Shown]:
        """The equation; what is carried is V1 [b, s, ng, hn], what is shown alpha [b, s, ng]."""
        (v1,) = carried or (v,)
        if not self.mixes:
            return k, v, (v1,), None
        alpha = self.alpha(x)
        own = 1 - alpha if self.config.value_gate in CONVEX else 1
        return k, own * v + alpha * v1, (v1,), alpha.mean(-1)


class SATFormer(Decoder):
    """The plain twin of --architecture satformer."""

    config_class: ClassVar[type[TwinConfig]] = SATFormerTwinConfig
    attention_class = GatedAttention
