"""DenseFormer in torch alone (arXiv 2402.02622).

    X_0 = embedding,  X_n = layer n of Y_{n-1}, residuals included
    Y_n = sum_j a_nj X_j,  over j <= n with j = n modulo dwa_dilation

for n that are multiples of dwa_period; else Y_n = X_n. The final norm reads Y_L.

Shapes: b batch, s sequence, h hidden.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from megatron_satformer.model.reference.decoder import (
    Attended,
    Attention,
    Carried,
    Decoder,
    Layer,
    TwinConfig,
)


@dataclass
class DenseFormerTwinConfig(TwinConfig):
    """TwinConfig with the distances of what is summed up."""

    dwa_dilation: int = 1
    dwa_period: int = 1


class SummingLayer(Layer):
    """Layer n, behind which stands Y_n; what is carried are X_0 .. X_n, [b, s, h] each."""

    def __init__(
        self, config: DenseFormerTwinConfig, layer: int, attention_class: type[Attention]
    ) -> None:
        super().__init__(config, layer, attention_class)
        n = layer + 1
        self.reads = range(n % config.dwa_dilation, n + 1, config.dwa_dilation)
        self.sums = n % config.dwa_period == 0
        if self.sums:
            self.depth_weights = nn.Parameter(torch.eye(len(self.reads))[-1])

    def forward(self, x: Tensor, carried: Carried) -> Attended:
        """Y_{n-1} [b, s, h] -> Y_n."""
        history = carried or (x,)
        x, _, shown = super().forward(x, ())
        history = (*history, x)
        if self.sums:
            x = sum(a * history[j] for a, j in zip(self.depth_weights, self.reads, strict=True))
        return x, history, shown


class DenseFormer(Decoder):
    """The plain twin of --architecture denseformer."""

    config_class: ClassVar[type[TwinConfig]] = DenseFormerTwinConfig
    layer_class = SummingLayer
