"""mHC in torch alone (arXiv 2512.24880).

    X' = M X + H_post^T T(H_pre X),  T attention or MLP with its own norm
    P, Q, R = alpha * (RMSNorm(vec X) phi) + bias      the norm runs over all streams, without gain
    H_pre = sigmoid(P),  H_post = 2 sigmoid(Q),  H_res = Sinkhorn(exp R)

M is H_res (mhc_residual plain) or its transpose. X are hc_streams streams, copies of the embedding
at the start; the final norm reads their mean, their sum, or a sum with weights
sigmoid(scale (RMSNorm(vec X) fn) + base).

Shapes: b batch, s sequence, h hidden, n streams.
"""

from collections.abc import Callable
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

EPS = 1e-6  # the least of softmax, from which Sinkhorn's rounds go on


@dataclass
class MHCTwinConfig(TwinConfig):
    """TwinConfig with residual streams."""

    hc_streams: int = 4
    mhc_residual: str = "transposed"
    mhc_collapse: str = "mean"
    mhc_sinkhorn_iterations: int = 20


def normed(streams: Tensor, eps: float) -> Tensor:
    """All streams over their root mean square: [b, s, n, h] -> [b, s, n h]."""
    flat = streams.flatten(-2)
    return flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)


def sinkhorn(logits: Tensor, rounds: int) -> Tensor:
    """exp(logits) [..., n, n], its rows and then its columns divided by their sums."""
    matrix = logits.softmax(-1) + EPS
    matrix = matrix / matrix.sum(-2, keepdim=True)
    for _ in range(rounds - 1):
        matrix = matrix / matrix.sum(-1, keepdim=True)
        matrix = matrix / matrix.sum(-2, keepdim=True)
    return matrix


class Connection(nn.Module):
    """Of one sublayer."""

    def __init__(self, config: MHCTwinConfig) -> None:
        super().__init__()
        self.config = config
        n = config.hc_streams
        k = n * n + 2 * n
        self.mapping_proj = nn.Linear(n * config.hidden_size, k, bias=False)
        self.alpha_pre, self.alpha_post, self.alpha_res = (
            nn.Parameter(torch.tensor([0.01])) for _ in range(3)
        )
        self.bias = nn.Parameter(torch.zeros(k))

    def forward(self, streams: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """X [b, s, n, h] -> X', around a sublayer [b, s, h] -> [b, s, h]."""
        n = self.config.hc_streams
        products = self.mapping_proj(normed(streams, self.config.rms_norm_eps))
        p, q, r = products.split([n, n, n * n], dim=-1)
        to_p, to_q, to_r = self.bias.split([n, n, n * n])
        pre, post = (
            (self.alpha_pre * p + to_p).sigmoid(),
            2 * (self.alpha_post * q + to_q).sigmoid(),
        )
        res = (self.alpha_res * r + to_r).unflatten(-1, (n, n))
        matrix = sinkhorn(res, self.config.mhc_sinkhorn_iterations)
        matrix = matrix if self.config.mhc_residual == "plain" else matrix.transpose(-1, -2)
        out = sublayer((pre.unsqueeze(-1) * streams).sum(-2))
        return matrix @ streams + post.unsqueeze(-1) * out.unsqueeze(-2)


class Head(nn.Module):
    """What the final norm reads of the streams where parameters say it."""

    def __init__(self, config: MHCTwinConfig) -> None:
        super().__init__()
        n = config.hc_streams
        self.fn = nn.Parameter(torch.zeros(n, n * config.hidden_size))
        self.base, self.scale = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.tensor([0.01]))
        self.eps = config.rms_norm_eps

    def forward(self, streams: Tensor) -> Tensor:
        """X [b, s, n, h] -> [b, s, h]."""
        weights = (self.scale * (normed(streams, self.eps) @ self.fn.t()) + self.base).sigmoid()
        return (weights.unsqueeze(-1) * streams).sum(-2)


class StreamsLayer(Layer):
    """Layer of streams: x is the first, what is carried are the others, [b, s, h] each."""

    def __init__(self, config: MHCTwinConfig, layer: int, attention_class: type[Attention]) -> None:
        super().__init__(config, layer, attention_class)
        self.streams = config.hc_streams
        self.attn_hc, self.mlp_hc = Connection(config), Connection(config)

    def forward(self, x: Tensor, carried: Carried) -> Attended:
        """Streams -> streams; in the first layer all are the embedding."""
        others = carried or (x,) * (self.streams - 1)
        streams = torch.stack((x, *others), dim=-2)
        streams = self.attn_hc(streams, lambda read: self.attend(read, ())[0])
        x, *others = self.mlp_hc(streams, self.feed).unbind(-2)
        return x, tuple(others), None


class MHC(Decoder):
    """The plain twin of --architecture mhc."""

    config_class: ClassVar[type[TwinConfig]] = MHCTwinConfig
    layer_class = StreamsLayer

    def __init__(self, config: MHCTwinConfig) -> None:
        super().__init__(config)
        if config.mhc_collapse == "head":
            self.model.hc_head = Head(config)
        for module in self.modules():
            if isinstance(module, Connection):
                nn.init.xavier_uniform_(module.mapping_proj.weight)

    def finish(self, x: Tensor, carried: Carried) -> Tensor:
        """The streams made one."""
        streams = torch.stack((x, *carried), dim=-2)
        if self.config.mhc_collapse == "head":
            return self.model.hc_head(streams)
        return streams.mean(-2) if self.config.mhc_collapse == "mean" else streams.sum(-2)
