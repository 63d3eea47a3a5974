"""ResFormer in torch alone, in all its forms (arXiv 2410.17897).

Of the layers n (1-based) that mix::

    V'_n    = lambda1_n V_1 + lambda2_n V_n
    lambda1 = lambda_scale * softmax(lambda_logits)      learnable_plus; else scalars, or fixed

Shapes: b batch, s sequence, ng KV heads, hn head dim, m mixing layers.
"""

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


@dataclass
class ResFormerTwinConfig(ValueResidualTwinConfig):
    """ValueResidualTwinConfig with a form."""

    resformer_form: str = "learnable_plus"
    resformer_lambda: float | None = None  # of "sparse"; None: 5


class StaticAttention(Attention):
    """Attention whose values are a weighted sum of V1 and their own."""

    def __init__(self, config: ResFormerTwinConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.mixes = layer in config.mixing_layers
        if self.mixes and config.resformer_form == "learnable":
            self.value_lambda1 = nn.Parameter(torch.full((1,), 0.5))
        if self.mixes and config.resformer_form.startswith("learnable"):
            self.value_lambda2 = nn.Parameter(torch.full((1,), 0.5))

    def lambdas(self, shared: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Weights of V_1 and V_n in this layer."""
        match self.config.resformer_form:
            case "learnable_plus":
                mine = self.layer - self.config.mixing_layers.start
                return shared[mine], self.value_lambda2
            case "learnable":
                return self.value_lambda1, self.value_lambda2
            case "identity":
                return 0.5, 0.5
            case "sparse":
                given = self.config.resformer_lambda
                return 5.0 if given is None else given, 1.0
        return 1.0, 0.0  # svformer

    def mix(
        self, x: Tensor, k: Tensor, v: Tensor, carried: Carried
    ) -> tuple[Tensor, Tensor, Carried, Shown]:
        """The equation; carried are the shared lambda1 and, behind layer 1, V1 [b, s, ng, hn]."""
        shared, v1 = carried if len(carried) == 2 else (*carried, v)
        if not self.mixes:
            return k, v, (shared, v1), None
        lambda1, lambda2 = self.lambdas(shared)
        return k, lambda1 * v1 + lambda2 * v, (shared, v1), None


class ResFormer(Decoder):
    """The plain twin of --architecture resformer."""

    config_class: ClassVar[type[TwinConfig]] = ResFormerTwinConfig
    attention_class = StaticAttention

    def __init__(self, config: ResFormerTwinConfig) -> None:
        super().__init__(config)
        if config.resformer_form != "learnable_plus":
            return
        lambdas = self.model.value_residual = nn.Module()
        lambdas.lambda_logits = nn.Parameter(torch.zeros(len(config.mixing_layers)))
        lambdas.lambda_scale = nn.Parameter(torch.full((1,), float(config.num_hidden_layers)))

    def start(self, input_ids: Tensor) -> Carried:
        """lambda1 of all layers that mix, [m]; [0] where they share none."""
        if self.config.resformer_form != "learnable_plus":
            return (torch.empty(0),)
        lambdas = self.model.value_residual
        return (lambdas.lambda_scale * lambdas.lambda_logits.softmax(-1),)
