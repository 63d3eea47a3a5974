"""ResFormer in torch alone, its learnable form (arXiv 2410.17897, "learnable plus").

Of the layers n (1-based) that mix::

    V'_n    = lambda1_n V_1 + lambda2_n V_n
    lambda1 = lambda_scale * softmax(lambda_logits)

Shapes: b batch, s sequence, ng KV heads, hn head dim, m mixing layers.
"""

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


class StaticAttention(Attention):
    """Attention whose values are a weighted sum of V1 and their own."""

    def __init__(self, config: ValueResidualTwinConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.mixes = layer in config.mixing_layers
        if self.mixes:
            self.value_lambda2 = nn.Parameter(torch.full((1,), 0.5))

    def mix(
        self, x: Tensor, k: Tensor, v: Tensor, carried: Carried
    ) -> tuple[Tensor, Tensor, Carried, Shown]:
        """The equation; carried are lambda1 [m] and, behind layer 1, V1 [b, s, ng, hn]."""
        lambda1, v1 = carried if len(carried) == 2 else (*carried, v)
        if not self.mixes:
            return k, v, (lambda1, v1), None
        weight = lambda1[self.layer - self.config.mixing_layers.start]
        return k, weight * v1 + self.value_lambda2 * v, (lambda1, v1), None


class ResFormer(Decoder):
    """The plain twin of --architecture resformer."""

    config_class: ClassVar[type[TwinConfig]] = ValueResidualTwinConfig
    attention_class = StaticAttention

    def __init__(self, config: ValueResidualTwinConfig) -> None:
        super().__init__(config)
        lambdas = self.model.value_residual = nn.Module()
        lambdas.lambda_logits = nn.Parameter(torch.zeros(len(config.mixing_layers)))
        lambdas.lambda_scale = nn.Parameter(torch.full((1,), float(config.num_hidden_layers)))

    def start(self, input_ids: Tensor) -> Carried:
        """lambda1 of all layers that mix, [m]."""
        lambdas = self.model.value_residual
        return (lambdas.lambda_scale * lambdas.lambda_logits.softmax(-1),)
