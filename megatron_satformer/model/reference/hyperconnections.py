"""Hyper-Connections in torch alone (arXiv 2409.19606).

    h_0 = A_m^T H,  H' = A_r^T H + B^T T(h_0),  T attention or MLP with its own norm

H are hc_streams streams, copies of the embedding at the start; the final norm reads their sum. Of
every sublayer, from row H_j of H:

    B_j, A_mj, A_rj = B0_j + s_b phi(N(H_j) W_b),  A0_j + s_a phi(N(H_j) W_a)

phi is tanh, N an RMSNorm without gain, or with one in the baseline form.

Shapes: b batch, s sequence, h hidden, n streams.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
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
class HyperConnectionsTwinConfig(TwinConfig):
    """TwinConfig with residual streams."""

    hc_streams: int = 4
    hc_dynamic: bool = True
    hc_tanh: bool = True
    hc_form: str = "paper"


class HyperConnection(nn.Module):
    """The connection of sublayer q, from 0."""

    def __init__(self, config: HyperConnectionsTwinConfig, q: int) -> None:
        super().__init__()
        self.config = config
        n, h = config.hc_streams, config.hidden_size
        self.static_beta = nn.Parameter(torch.ones(n))
        read = F.one_hot(torch.tensor(q % n), n)[:, None]
        self.static_alpha = nn.Parameter(torch.cat((read, torch.eye(n)), dim=1).flatten())
        if config.hc_dynamic:
            if config.hc_form == "baseline":
                self.norm_gain = nn.Parameter(torch.ones(h))
            self.dynamic_beta_proj = nn.Parameter(torch.zeros(h, 1))
            self.dynamic_alpha_proj = nn.Parameter(torch.zeros(h, 1 + n))
            self.dynamic_beta_scale = nn.Parameter(torch.tensor([0.01]))
            self.dynamic_alpha_scale = nn.Parameter(torch.tensor([0.01]))

    def forward(self, streams: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """H [b, s, n, h] -> H', around a sublayer [b, s, h] -> [b, s, h]."""
        n = self.config.hc_streams
        beta: Tensor = self.static_beta  # B0
        alpha = self.static_alpha.view(n, 1 + n)  # A_m0 | A_r0
        if self.config.hc_dynamic:
            phi = torch.tanh if self.config.hc_tanh else lambda x: x
            own = self.config.hc_form == "baseline"
            eps = torch.finfo(torch.float32).eps if own else self.config.rms_norm_eps
            normed = streams * torch.rsqrt(streams.square().mean(-1, keepdim=True) + eps)
            normed = normed * self.norm_gain if own else normed
            added = phi(normed @ self.dynamic_beta_proj).squeeze(-1)  # [b, s, n]
            beta = beta + self.dynamic_beta_scale * added
            alpha = alpha + self.dynamic_alpha_scale * phi(normed @ self.dynamic_alpha_proj)
        read, kept = alpha[..., 0], alpha[..., 1:]  # A_m [..., n], A_r [..., n, n]
        out = sublayer((read.unsqueeze(-1) * streams).sum(-2))
        return beta.unsqueeze(-1) * out.unsqueeze(-2) + kept.transpose(-1, -2) @ streams


class HyperLayer(Layer):
    """Layer of streams: x is the first, what is carried are the others, [b, s, h] each."""

    def __init__(
        self, config: HyperConnectionsTwinConfig, layer: int, attention_class: type[Attention]
    ) -> None:
        super().__init__(config, layer, attention_class)
        self.streams = config.hc_streams
        self.attn_hc, self.mlp_hc = (HyperConnection(config, 2 * layer + i) for i in (0, 1))

    def forward(self, x: Tensor, carried: Carried) -> Attended:
        """Streams -> streams; in the first layer all are the embedding."""
        others = carried or (x,) * (self.streams - 1)
        streams = torch.stack((x, *others), dim=-2)
        streams = self.attn_hc(streams, lambda read: self.attend(read, ())[0])
        x, *others = self.mlp_hc(streams, self.feed).unbind(-2)
        return x, tuple(others), None


class HyperConnections(Decoder):
    """The plain twin of --architecture hyperconnections."""

    config_class: ClassVar[type[TwinConfig]] = HyperConnectionsTwinConfig
    layer_class = HyperLayer

    def __init__(self, config: HyperConnectionsTwinConfig) -> None:
        super().__init__(config)
        for name, parameter in self.named_parameters():
            if ".dynamic_" in name and name.endswith("_proj"):
                nn.init.zeros_(parameter)

    def finish(self, x: Tensor, carried: Carried) -> Tensor:
        """The sum of the streams."""
        return sum(carried, x)
