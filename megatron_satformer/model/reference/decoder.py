"""The plain twin: Transformer, ResFormer and SATFormer decoders in torch, float32, one device.

The truth that every fast path is compared with: written to be read, it must not know Megatron,
parallelism or caches. Its parameters are named as in the exported Hugging Face model.

Per KV head g of layer n (1-based), with x_n the normed input of the attention of layer n::

    V_n   = W_v,n x_n,  V'_1 = V_1
    V'_n  = V_n + gate(W_gate,n x_n) * V_1                                             SATFormer
    V'_n  = lambda1_n V_1 + lambda2_n V_n,  lambda1 = lambda_scale * softmax(logits)   ResFormer

Shapes: b batch, s sequence, h hidden, np query heads, ng KV heads, hn head dim, L layers.
Source: arXiv 2605.03953 (SATFormer), arXiv 2410.17897 (ResFormer, its learnable form).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# logits [..., ng] -> alpha [..., ng]; ng is the number of KV heads of the whole model
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softmax": lambda z: z.softmax(-1) * z.size(-1),
    "softmax_sigmoid": lambda z: z.softmax(-1) * z.sigmoid() * z.size(-1),
    "tanh": torch.tanh,
    "identity": lambda z: z,
}

Mixed = tuple[Tensor, Tensor | None]  # V' and alpha
Attended = tuple[Tensor, Tensor, Tensor | None]  # output, V1 and alpha


@dataclass
class ReferenceConfig:
    """Shape and options of a reference decoder, named as in the exported config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int  # L
    num_attention_heads: int  # np
    num_key_value_heads: int  # ng
    head_dim: int  # hn
    architecture: str = "satformer"  # transformer, resformer or satformer
    value_gate: str = "relu"
    value_gate_bias: bool = False
    value_residual_last_k: int | None = (
        None  # None: layers 2..L mix; k: the last k, 1 <= k <= L - 1
    )
    qk_norm: bool = True
    attention_bias: bool = False  # on q, k and v only
    tie_word_embeddings: bool = True
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4

    @property
    def mixing_layers(self) -> range:
        """Indices (0-based) of the layers that mix V1 into their values; never the first layer."""
        if self.architecture == "transformer":
            return range(0)
        num_layers, last_k = self.num_hidden_layers, self.value_residual_last_k
        return range(1 if last_k is None else max(1, num_layers - last_k), num_layers)


class ReferenceOutput(NamedTuple):
    """logits [b, s, vocab]; mean loss or None; alpha [b, s, ng] of each mixing SATFormer layer."""

    logits: Tensor
    loss: Tensor | None
    alphas: tuple[Tensor, ...]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Any shape whose last axis is the normed one -> the same."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def apply_rope(x: Tensor, theta: float) -> Tensor:
    """Rotates the two halves of the head dim by position: x [b, s, heads, hn] -> same shape."""
    inv_freq = theta ** (-torch.arange(0, x.size(3), 2, device=x.device) / x.size(3))  # [hn/2]
    angles = torch.arange(x.size(1), device=x.device)[:, None] * inv_freq  # [s, hn/2]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # [s, 1, hn/2]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class ReferenceAttention(nn.Module):
    """Causal grouped-query attention whose values carry the value residual."""

    def __init__(self, config: ReferenceConfig, layer: int) -> None:
        super().__init__()
        self.config, self.mixes = config, layer in config.mixing_layers
        h, hn, ng = config.hidden_size, config.head_dim, config.num_key_value_heads
        self.q_proj = nn.Linear(h, config.num_attention_heads * hn, bias=config.attention_bias)
        self.k_proj, self.v_proj = (nn.Linear(h, ng * hn, bias=config.attention_bias) for _ in "kv")
        self.o_proj = nn.Linear(config.num_attention_heads * hn, h, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(hn, config.rms_norm_eps) for _ in "qk")
        if self.mixes and config.architecture == "satformer":
            self.value_gate = nn.Linear(h, ng, bias=config.value_gate_bias)
        if self.mixes and config.architecture == "resformer":
            self.value_lambda2 = nn.Parameter(torch.full((1,), 0.5))

    def mix_values(self, x: Tensor, v: Tensor, v1: Tensor, lambda1: Any) -> Mixed:
        """The equation: V_n and V_1, both [b, s, ng, hn] -> V'_n and alpha [b, s, ng] or None."""
        if not self.mixes:
            return v, None
        if self.config.architecture == "resformer":
            return lambda1 * v1 + self.value_lambda2 * v, None
        alpha = GATES[self.config.value_gate](self.value_gate(x))  # [b, s, ng]
        return v + alpha[..., None] * v1, alpha

    def forward(self, x: Tensor, v1: Tensor | None, lambda1: Tensor | None) -> Attended:
        """Normed x [b, s, h], v1 None in layer 1 -> output [b, s, h], v1 [b, s, ng, hn], alpha."""
        s, hn = x.size(1), self.config.head_dim
        q, k, v = (w(x).unflatten(-1, (-1, hn)) for w in (self.q_proj, self.k_proj, self.v_proj))
        v1 = v if v1 is None else v1
        v, alpha = self.mix_values(x, v, v1, lambda1)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, self.config.rope_theta), apply_rope(k, self.config.rope_theta)
        k, v = (t.repeat_interleave(q.size(2) // t.size(2), dim=2) for t in (k, v))
        future = torch.full((s, s), float("-inf"), device=x.device).triu(1)
        scores = torch.einsum("bqnd,bknd->bnqk", q, k) * hn**-0.5 + future
        out = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v)  # [b, s, np, hn]
        return self.o_proj(out.flatten(2)), v1, alpha


class ReferenceLayer(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: ReferenceConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = ReferenceAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        h, ffn = config.hidden_size, config.intermediate_size
        self.mlp: Any = nn.Module()
        self.mlp.gate_proj, self.mlp.up_proj = (nn.Linear(h, ffn, bias=False) for _ in "gu")
        self.mlp.down_proj = nn.Linear(ffn, h, bias=False)

    def forward(self, x: Tensor, v1: Tensor | None, lambda1: Tensor | None) -> Attended:
        """As the attention, with its residual stream x [b, s, h]."""
        out, v1, alpha = self.self_attn(self.input_layernorm(x), v1, lambda1)
        x = x + out
        y = self.post_attention_layernorm(x)
        y = F.silu(self.mlp.gate_proj(y)) * self.mlp.up_proj(y)
        return x + self.mlp.down_proj(y), v1, alpha


class ReferenceModel(nn.Module):
    """Token ids [b, s] -> logits, loss and alphas; parameter names as in the exported folder."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.config, num_layers = config, config.num_hidden_layers
        self.model: Any = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(ReferenceLayer(config, n) for n in range(num_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.architecture == "resformer":
            lambdas = self.model.value_residual = nn.Module()
            lambdas.lambda_logits = nn.Parameter(torch.zeros(len(config.mixing_layers)))
            lambdas.lambda_scale = nn.Parameter(torch.full((1,), float(num_layers)))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():  # norms and lambdas are set above
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> ReferenceOutput:
        """Labels [b, s] stand beside the logits that predict them (shifted), -100 is ignored."""
        x, v1, alphas = self.model.embed_tokens(input_ids), None, []
        lambda1: dict[int, Tensor] = {}
        if self.config.architecture == "resformer":
            lambdas = self.model.value_residual
            values = lambdas.lambda_scale * lambdas.lambda_logits.softmax(-1)
            lambda1 = dict(zip(self.config.mixing_layers, values, strict=True))
        for n, layer in enumerate(self.model.layers):
            x, v1, alpha = layer(x, v1, lambda1.get(n))
            alphas += [] if alpha is None else [alpha]
        logits = self.lm_head(self.model.norm(x))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return ReferenceOutput(logits, loss, tuple(alphas))
