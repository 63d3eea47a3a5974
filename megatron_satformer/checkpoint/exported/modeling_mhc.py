"""mHC for Hugging Face transformers (arXiv 2512.24880).

    X' = M X + H_post^T T(H_pre X),  T attention or MLP with its own norm
    P, Q, R = alpha * (RMSNorm(vec X) phi) + bias      the norm runs over all streams, without gain
    H_pre = sigmoid(P),  H_post = 2 sigmoid(Q),  H_res = Sinkhorn(exp R)

M is H_res (mhc_residual plain) or its transpose. X are hc_streams streams, copies of the embedding
at the start; the final norm reads their mean, their sum, or a sum with weights
sigmoid(scale (RMSNorm(vec X) fn) + base). The cache is that of a plain Transformer: the streams of
the tokens at hand are all that a layer needs.

Shapes: b batch, s sequence, h hidden, n streams.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_mhc import MHCConfig
from .modeling_access import LearnedAccess, number_names
from .modeling_decoder import (
    DecoderAttention,
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderLayer,
    DecoderModel,
    DecoderPreTrainedModel,
)

EPS = 1e-6  # the least of softmax, from which Sinkhorn's rounds go on


def project_normed(streams: Tensor, project: Callable[[Tensor], Tensor], eps: float) -> Tensor:
    """The projection of RMSNorm(vec X) in float32: [b, s, n, h] -> [b, s, k]."""
    flat = streams.flatten(-2).float()
    return project(flat) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)


class Float32Projection(nn.Module):
    """A projection in float32, a module so that offloaded weights come.

    An nn.Linear would not do: vLLM puts one of its own there, in the model's dtype.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], float32."""
        return nn.functional.linear(x, self.weight.float())


class MHCConnection(nn.Module):
    """How one sublayer reads the streams, and how it writes to them."""

    def __init__(self, config: MHCConfig) -> None:
        super().__init__()
        n = config.hc_streams
        self.streams, self.rounds = n, config.mhc_sinkhorn_iterations
        self.plain, self.eps = config.mhc_residual == "plain", config.rms_norm_eps
        self.mapping_proj = Float32Projection(n * config.hidden_size, n * n + 2 * n)
        self.alpha_pre, self.alpha_post, self.alpha_res = (
            nn.Parameter(torch.empty(1)) for _ in range(3)
        )
        self.bias = nn.Parameter(torch.empty(n * n + 2 * n))
        names = number_names(n)
        self.reads = LearnedAccess(names, ["read"])
        self.keeps = LearnedAccess(names, names)
        self.writes = LearnedAccess(["written"], names)

    def reset(self) -> None:
        """Values with which the model is close to a plain Transformer."""
        init.xavier_uniform_(self.mapping_proj.weight)
        for alpha in (self.alpha_pre, self.alpha_post, self.alpha_res):
            init.constant_(alpha, 0.01)
        init.zeros_(self.bias)

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """X [b, s, n, h] -> H_post^T [b, s, n, 1], M X like X, H_pre X [b, s, h], in float32."""
        n = self.streams
        counts = [n, n, n * n]
        alphas = (self.alpha_pre, self.alpha_post, self.alpha_res)
        alpha = torch.cat([a.float().expand(k) for a, k in zip(alphas, counts, strict=True)])
        logits = alpha * project_normed(streams, self.mapping_proj, self.eps)
        pre, post, res = (logits + self.bias.float()).split(counts, dim=-1)
        matrix = res.unflatten(-1, (n, n)).softmax(-1) + EPS
        matrix = matrix / matrix.sum(-2, keepdim=True)
        for _ in range(self.rounds - 1):
            matrix = matrix / matrix.sum(-1, keepdim=True)
            matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix if self.plain else matrix.transpose(-1, -2)
        wide = streams.float()
        read = (self.reads(pre.sigmoid().unsqueeze(-2)) @ wide).squeeze(-2)
        return self.writes(2 * post.sigmoid().unsqueeze(-1)), self.keeps(matrix) @ wide, read


class MHCHead(nn.Module):
    """What the final norm reads of the streams where parameters say it."""

    def __init__(self, config: MHCConfig) -> None:
        super().__init__()
        n = config.hc_streams
        self.fn = nn.Parameter(torch.empty(n, n * config.hidden_size))
        self.base, self.scale = nn.Parameter(torch.empty(n)), nn.Parameter(torch.empty(1))
        self.eps = config.rms_norm_eps
        self.reads = LearnedAccess(number_names(n), ["read"])

    def reset(self) -> None:
        """Values with which every stream weighs the same."""
        init.zeros_(self.fn)
        init.zeros_(self.base)
        init.constant_(self.scale, 0.01)

    def forward(self, streams: Tensor) -> Tensor:
        """X [b, s, n, h] -> [b, s, h] in float32."""
        logits = self.scale.float() * project_normed(
            streams, lambda x: x @ self.fn.float().t(), self.eps
        )
        weights = self.reads((logits + self.base.float()).sigmoid().unsqueeze(-2))
        return (weights @ streams.float()).squeeze(-2)


class MHCLayer(DecoderLayer):
    """Layer of streams: hidden_states is the first, what is carried are the others."""

    def __init__(
        self, config: MHCConfig, layer_idx: int, attention_class: type[DecoderAttention]
    ) -> None:
        super().__init__(config, layer_idx, attention_class)
        self.streams = config.hc_streams
        self.attn_hc, self.mlp_hc = MHCConnection(config), MHCConnection(config)

    def forward(self, hidden_states: Tensor, *carried: Tensor, **kwargs) -> tuple[Any, ...]:
        """Streams [b, s, h] -> first stream, gates, attention weights, other streams.

        In the first layer all are the embedding. Sums are in float32.
        """
        dtype = hidden_states.dtype
        others = (hidden_states,) * (self.streams - 1)
        if self.self_attn.layer_idx:
            others = self.self_attn.expect(carried, self.streams - 1)
        streams = torch.stack((hidden_states, *others), dim=-2)
        write, kept, read = self.attn_hc(streams)
        normed = self.input_layernorm(read.to(dtype))
        output, gates, weights, _ = self.self_attn(normed, (), **kwargs)
        streams = (kept + write * output.float().unsqueeze(-2)).to(dtype)
        write, kept, read = self.mlp_hc(streams)
        output = self.mlp(self.post_attention_layernorm(read.to(dtype)))
        streams = (kept + write * output.float().unsqueeze(-2)).to(dtype)
        return streams[..., 0, :], gates, weights, *streams[..., 1:, :].unbind(-2)


class MHCPreTrainedModel(DecoderPreTrainedModel):
    """What the models share: initialisation, close to a plain Transformer."""

    config_class = MHCConfig
    _no_split_modules: ClassVar[list[str]] = ["MHCLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (MHCConnection, MHCHead)):
            module.reset()


class MHCModel(MHCPreTrainedModel, DecoderModel):
    """DecoderModel whose layers hand on streams; of these `output_hidden_states` has the first."""

    layer_class = MHCLayer

    def __init__(self, config: MHCConfig) -> None:
        super().__init__(config)
        self.hc_head = MHCHead(config) if config.mhc_collapse == "head" else None
        self.post_init()

    def finish(self, hidden_states: Tensor, carried: tuple[Tensor, ...]) -> Tensor:
        """The streams made one, [b, s, h]."""
        streams = torch.stack((hidden_states, *carried), dim=-2)
        if self.hc_head is not None:
            return self.hc_head(streams).to(hidden_states.dtype)
        made = streams.float()
        made = made.mean(-2) if self.config.mhc_collapse == "mean" else made.sum(-2)
        return made.to(hidden_states.dtype)


class MHCForCausalLM(MHCPreTrainedModel, DecoderForCausalLM):
    """MHCModel with its language-model head."""

    model_class = MHCModel


class MHCForSequenceClassification(MHCPreTrainedModel, DecoderForSequenceClassification):
    """MHCModel with a score per label."""

    model_class = MHCModel


__all__ = [
    "MHCForCausalLM",
    "MHCForSequenceClassification",
    "MHCModel",
    "MHCPreTrainedModel",
]
