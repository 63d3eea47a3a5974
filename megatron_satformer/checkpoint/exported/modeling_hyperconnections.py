"""Hyper-Connections for Hugging Face transformers (arXiv 2409.19606).

    h_0 = A_m^T H,  H' = A_r^T H + B^T T(h_0),  T attention or MLP with its own norm

H are hc_streams streams, copies of the embedding at the start; the final norm reads their sum. Of
every sublayer, from row H_j of H:

    B_j, A_mj, A_rj = B0_j + s_b phi(N(H_j) W_b),  A0_j + s_a phi(N(H_j) W_a)

phi is tanh, N an RMSNorm without gain, or with one in the baseline form. The cache is that of a
plain Transformer: the streams of the tokens at hand are all that a layer needs.

Shapes: b batch, s sequence, h hidden, n streams.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_hyperconnections import HyperConnectionsConfig
from .modeling_access import LearnedAccess, number_names
from .modeling_decoder import (
    DecoderAttention,
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderLayer,
    DecoderModel,
    DecoderPreTrainedModel,
)


class HyperConnection(nn.Module):
    """How sublayer q, from 0, reads the streams, and how it writes to them."""

    def __init__(self, config: HyperConnectionsConfig, q: int) -> None:
        super().__init__()
        self.q, self.streams, self.tanh = q, config.hc_streams, config.hc_tanh
        self.dynamic, self.baseline = config.hc_dynamic, config.hc_form == "baseline"
        self.eps = torch.finfo(torch.float32).eps if self.baseline else config.rms_norm_eps
        n, h = config.hc_streams, config.hidden_size
        names = number_names(n)
        self.reads = LearnedAccess(names, ["read", *names])
        self.writes = LearnedAccess(["written"], names)
        self.static_beta = nn.Parameter(torch.empty(n))
        self.static_alpha = nn.Parameter(torch.empty(n * (1 + n)))
        if config.hc_dynamic:
            if self.baseline:
                self.norm_gain = nn.Parameter(torch.empty(h))
            self.dynamic_beta_proj = nn.Parameter(torch.empty(h, 1))
            self.dynamic_alpha_proj = nn.Parameter(torch.empty(h, 1 + n))
            self.dynamic_beta_scale = nn.Parameter(torch.empty(1))
            self.dynamic_alpha_scale = nn.Parameter(torch.empty(1))

    def reset(self) -> None:
        """Values with which the model is a plain Transformer."""
        init.ones_(self.static_beta)
        identity = torch.eye(self.streams)
        alpha = torch.cat((identity[:, self.q % self.streams, None], identity), dim=1)
        init.copy_(self.static_alpha, alpha.flatten())
        if self.dynamic:
            if self.baseline:
                init.ones_(self.norm_gain)
            init.zeros_(self.dynamic_beta_proj)
            init.zeros_(self.dynamic_alpha_proj)
            init.constant_(self.dynamic_beta_scale, 0.01)
            init.constant_(self.dynamic_alpha_scale, 0.01)

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """H [b, s, n, h] in float32 -> B [..., n, 1], A_r^T H like H, A_m^T H [b, s, h]."""
        n = self.streams
        beta = self.static_beta.float().unsqueeze(-1)
        alpha = self.static_alpha.float().view(n, 1 + n)
        if self.dynamic:
            normed = streams * torch.rsqrt(streams.square().mean(-1, keepdim=True) + self.eps)
            normed = normed * self.norm_gain.float() if self.baseline else normed
            own_beta = normed @ self.dynamic_beta_proj.float()
            own_alpha = normed @ self.dynamic_alpha_proj.float()
            if self.tanh:
                own_beta, own_alpha = own_beta.tanh(), own_alpha.tanh()
            beta = beta + self.dynamic_beta_scale.float() * own_beta
            alpha = alpha + self.dynamic_alpha_scale.float() * own_alpha
        mixed = self.reads(alpha.transpose(-1, -2)) @ streams  # [b, s, 1 + n, h]
        return self.writes(beta), mixed[..., 1:, :], mixed[..., 0, :]


class HyperConnectionsLayer(DecoderLayer):
    """Layer of streams: hidden_states is the first, what is carried are the others."""

    def __init__(
        self,
        config: HyperConnectionsConfig,
        layer_idx: int,
        attention_class: type[DecoderAttention],
    ) -> None:
        super().__init__(config, layer_idx, attention_class)
        self.streams = config.hc_streams
        self.attn_hc = HyperConnection(config, 2 * layer_idx)
        self.mlp_hc = HyperConnection(config, 2 * layer_idx + 1)

    def forward(self, hidden_states: Tensor, *carried: Tensor, **kwargs) -> tuple[Any, ...]:
        """Streams [b, s, h] -> first stream, gates, attention weights, other streams.

        In the first layer all are the embedding. Sums are in float32.
        """
        dtype = hidden_states.dtype
        others = (hidden_states,) * (self.streams - 1)
        if self.self_attn.layer_idx:
            others = self.self_attn.expect(carried, self.streams - 1)
        streams = torch.stack((hidden_states, *others), dim=-2).float()
        beta, streams, read = self.attn_hc(streams)
        normed = self.input_layernorm(read.to(dtype))
        output, gates, weights, _ = self.self_attn(normed, (), **kwargs)
        streams = self._write(streams, beta, output, dtype)
        beta, streams, read = self.mlp_hc(streams)
        output = self.mlp(self.post_attention_layernorm(read.to(dtype)))
        streams = self._write(streams, beta, output, dtype).to(dtype)
        return streams[..., 0, :], gates, weights, *streams[..., 1:, :].unbind(-2)

    @staticmethod
    def _write(streams: Tensor, beta: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
        """A_r^T H + B^T T in float32, rounded to the model's dtype as training rounds it."""
        return (streams + beta * output.float().unsqueeze(-2)).to(dtype).float()


class HyperConnectionsPreTrainedModel(DecoderPreTrainedModel):
    """What the models share: initialisation, as a plain Transformer."""

    config_class = HyperConnectionsConfig
    _no_split_modules: ClassVar[list[str]] = ["HyperConnectionsLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HyperConnection):
            module.reset()


class HyperConnectionsModel(HyperConnectionsPreTrainedModel, DecoderModel):
    """DecoderModel whose layers hand on streams; of these `output_hidden_states` has the first."""

    layer_class = HyperConnectionsLayer

    def finish(self, hidden_states: Tensor, carried: tuple[Tensor, ...]) -> Tensor:
        """The sum of the streams, [b, s, h]."""
        streams = torch.stack((hidden_states, *carried), dim=-2)
        return streams.float().sum(-2).to(hidden_states.dtype)


class HyperConnectionsForCausalLM(HyperConnectionsPreTrainedModel, DecoderForCausalLM):
    """HyperConnectionsModel with its language-model head."""

    model_class = HyperConnectionsModel


class HyperConnectionsForSequenceClassification(
    HyperConnectionsPreTrainedModel, DecoderForSequenceClassification
):
    """HyperConnectionsModel with a score per label."""

    model_class = HyperConnectionsModel


__all__ = [
    "HyperConnectionsForCausalLM",
    "HyperConnectionsForSequenceClassification",
    "HyperConnectionsModel",
    "HyperConnectionsPreTrainedModel",
]
