"""MUDDFormer in torch alone (arXiv 2502.12170).

    X_0 = embedding,  X_n = output of layer n, residuals included
    A_n = GELU(RMSNorm(X_n) W1_n) W2_n + a_n        per token; the norm has no gain
    X^c_n = sum_j A^c_nj X_j,  over j <= n          c = q, k, v, r; behind the last layer r alone

Layer n + 1 adds attention, of the normed X^q_n, X^k_n and X^v_n, to X^r_n; layer 1 reads X_0 in all
four ways, with one norm. With mudd_prepost_norm

    X^c_n = RMSNorm(sum_j A^c_nj RMSNorm(X_j)) + X_n

Shapes: b batch, s sequence, h hidden, C ways.
"""

from dataclasses import dataclass, replace
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
    RMSNorm,
    TwinConfig,
)


@dataclass
class MuddFormerTwinConfig(TwinConfig):
    """TwinConfig with the forms of sums and MLPs."""

    mudd_prepost_norm: bool = False
    mudd_ffn_realloc: bool = False
    mudd_form: str = "paper"

    def resized(self, n: int) -> "MuddFormerTwinConfig":
        """The same with the MLP of layer n: 0.5 to 1.5 times as wide, a multiple of 128 or 256."""
        if not self.mudd_ffn_realloc:
            return self
        last, base = self.num_hidden_layers - 1, self.intermediate_size
        if self.mudd_form == "baseline":
            share = (0.5 * (last + 1 - n) + 1.5 * (n - 1)) / last
            width = 256 * max(1, (round(share * base) + 127) // 256)
        else:
            width = 128 * max(1, round((0.5 + (n - 1) / last) * base / 128))
        return replace(self, intermediate_size=width)


def normed(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without gain over the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class Aggregate(nn.Module):
    """X_0 .. X_n -> X^c_n of C ways, [b, s, h] each."""

    def __init__(self, config: MuddFormerTwinConfig, ways: int, n: int) -> None:
        super().__init__()
        self.config, self.ways, self.sources = config, ways, n + 1
        size, h = ways * self.sources, config.hidden_size
        width = size
        if config.mudd_form == "released":  # behind the last layer there is one way
            width = ((size if ways > 1 else 4 * size) // 64 + 1) * 64
        self.w1 = nn.Parameter(torch.randn(width, h) * h**-0.5)
        self.w2 = nn.Parameter(torch.zeros(size, width))
        self.static = nn.Parameter(torch.zeros(size))
        if config.mudd_prepost_norm:
            self.pre_gains = nn.Parameter(torch.ones(self.sources * h))
            self.post_gains = nn.Parameter(torch.full((ways * h,), 1e-3))
        else:
            with torch.no_grad():
                self.static.view(ways, -1)[:, -1] = 1

    def forward(self, history: Carried) -> Carried:
        """The equation."""
        eps = self.config.rms_norm_eps
        weights = F.gelu(normed(history[-1], eps) @ self.w1.t()) @ self.w2.t() + self.static
        weights = weights.unflatten(-1, (self.ways, self.sources))  # [b, s, C, n + 1]
        read = torch.stack(history, dim=-2)  # [b, s, n + 1, h]
        if self.config.mudd_prepost_norm:
            read = normed(read, eps) * self.pre_gains.view(self.sources, -1)
        sums = torch.einsum("bscj,bsjh->bsch", weights, read)
        if self.config.mudd_prepost_norm:
            sums = normed(sums, eps) * self.post_gains.view(self.ways, -1) + history[-1].unsqueeze(
                2
            )
        return sums.unbind(2)


class MuddLayer(Layer):
    """Layer n, behind which stand the X^c_n; what is carried are q, k and v, and X_0 .. X_n."""

    def __init__(
        self, config: MuddFormerTwinConfig, layer: int, attention_class: type[Attention]
    ) -> None:
        n = layer + 1
        super().__init__(config.resized(n), layer, attention_class)
        self.ways = n > 1 or config.mudd_form == "baseline"
        if self.ways:
            h, eps = config.hidden_size, config.rms_norm_eps
            self.input_layernorm_k, self.input_layernorm_v = (RMSNorm(h, eps) for _ in "kv")
        self.aggregate = Aggregate(config, 1 if n == config.num_hidden_layers else 4, n)

    def attend(self, x: Tensor, carried: Carried) -> Attended:
        """Norms and attention, without the residual."""
        if not self.ways:
            return super().attend(x, ())
        q, k, v = carried[:3] or (x, x, x)
        inputs = self.input_layernorm(q), self.input_layernorm_k(k), self.input_layernorm_v(v)
        return self.self_attn(inputs, ())

    def forward(self, x: Tensor, carried: Carried) -> Attended:
        """X^r_{n-1} [b, s, h] -> X^r_n."""
        history = carried[3:] or (x,)
        x, _, shown = super().forward(x, carried)
        history = (*history, x)
        *ways, x = self.aggregate(history)
        return x, (*ways, *history), shown


class MuddFormer(Decoder):
    """The plain twin of --architecture muddformer."""

    config_class: ClassVar[type[TwinConfig]] = MuddFormerTwinConfig
    layer_class = MuddLayer

    def __init__(self, config: MuddFormerTwinConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:  # matrices that are no N(0, 0.02)
            nn.init.normal_(layer.aggregate.w1, std=config.hidden_size**-0.5)
            nn.init.zeros_(layer.aggregate.w2)
