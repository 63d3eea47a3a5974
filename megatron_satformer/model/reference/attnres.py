"""Attention Residuals in torch alone (arXiv 2603.15031).

    h = sum_j p_j b_j,  p = softmax_j(w . RMSNorm(b_j)),  the norm with a gain of its own

is what attention or MLP of a layer, or the final norm, reads. b_0 is the embedding, the others are
sums of what sublayers computed: over attnres_block_layers layers (None: an eighth of all), or in
the full form of one sublayer each.

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
class AttnResTwinConfig(TwinConfig):
    """TwinConfig with what a source is."""

    attnres_form: str = "block"
    attnres_block_layers: int | None = None


class DepthQuery(nn.Module):
    """What one reader reads of all sources."""

    def __init__(self, config: AttnResTwinConfig) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(config.hidden_size))
        self.query = nn.Parameter(torch.zeros(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, sources: Carried) -> Tensor:
        """Tensors [b, s, h] -> their weighted mean."""
        values = torch.stack(sources)
        keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + self.eps) * self.gain
        weights = (keys @ self.query).softmax(0)  # [sources, b, s]
        return (weights.unsqueeze(-1) * values).sum(0)


class SourcesLayer(Layer):
    """Layer of sources: x is the newest, what is carried are those that ended."""

    def __init__(
        self, config: AttnResTwinConfig, layer: int, attention_class: type[Attention]
    ) -> None:
        super().__init__(config, layer, attention_class)
        self.attn_res, self.mlp_res = DepthQuery(config), DepthQuery(config)
        self.full = config.attnres_form == "full"
        size = config.attnres_block_layers or -(-config.num_hidden_layers // 8)
        self.begins = self.full or layer % size == 0

    def forward(self, x: Tensor, carried: Carried) -> Attended:
        """Sources -> sources."""
        sources = (*carried, x)
        out, _, shown = self.attend(self.attn_res(sources), ())
        sources = (*sources, out) if self.begins else (*carried, x + out)
        out = self.feed(self.mlp_res(sources))
        *ended, newest = (*sources, out) if self.full else (*sources[:-1], sources[-1] + out)
        return newest, tuple(ended), shown


class AttnRes(Decoder):
    """The plain twin of --architecture attnres."""

    config_class: ClassVar[type[TwinConfig]] = AttnResTwinConfig
    layer_class = SourcesLayer

    def __init__(self, config: AttnResTwinConfig) -> None:
        super().__init__(config)
        self.model.final_res = DepthQuery(config)

    def finish(self, x: Tensor, carried: Carried) -> Tensor:
        """A last sum over all sources."""
        return self.model.final_res((*carried, x))
