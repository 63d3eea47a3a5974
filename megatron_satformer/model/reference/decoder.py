"""The plain Transformer decoder in torch, float32, one device, and the seams of its relatives.

The truth that every fast path is compared with: written to be read, it must not know Megatron,
parallelism or caches. Its parameters are named as in the exported Hugging Face model. Each relative
is a file beside this one that overrides the seams: `Attention.mix` and `mix_normed`,
`Layer.forward`, `Decoder.start` and `Decoder.finish`.

Shapes: b batch, s sequence, h hidden, np query heads, ng KV heads, hn head dim, L layers.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Carried = tuple[Tensor, ...]  # what a layer hands to the next one beside the residual stream
Shown = Tensor | None  # what a layer tells of itself, such as alpha [b, s, ng]
Attended = tuple[Tensor, Carried, Shown]


@dataclass
class TwinConfig:
    """Shape of a decoder, named as in the exported config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int  # L
    num_attention_heads: int  # np
    num_key_value_heads: int  # ng
    head_dim: int  # hn
    qk_norm: bool = True
    attention_bias: bool = False  # on q, k and v only
    tie_word_embeddings: bool = True
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4


class DecoderOutput(NamedTuple):
    """logits [b, s, vocab]; mean loss or None; what each layer has shown, if it has."""

    logits: Tensor
    loss: Tensor | None
    shown: tuple[Tensor, ...]


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


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer  # 0-based
        h, hn, ng = config.hidden_size, config.head_dim, config.num_key_value_heads
        self.q_proj = nn.Linear(h, config.num_attention_heads * hn, bias=config.attention_bias)
        self.k_proj, self.v_proj = (nn.Linear(h, ng * hn, bias=config.attention_bias) for _ in "kv")
        self.o_proj = nn.Linear(config.num_attention_heads * hn, h, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(hn, config.rms_norm_eps) for _ in "qk")

    def mix(
        self, x: Tensor, k: Tensor, v: Tensor, carried: Carried
    ) -> tuple[Tensor, Tensor, Carried, Shown]:
        """Keys and values as attention reads them, before norm and rotation.

        Args:
            x: normed input, [b, s, h].
            k: projected, [b, s, ng, hn].
            v: projected, [b, s, ng, hn].
            carried: from the layer before.
        """
        return k, v, carried, None

    def mix_normed(
        self, q: Tensor, k: Tensor, v: Tensor, carried: Carried
    ) -> tuple[Tensor, Carried]:
        """Values as attention reads them, from q and k as normed, before rotation; what is carried.

        Args:
            q: [b, s, np, hn].
            k: [b, s, ng, hn].
            v: from `mix`, [b, s, ng, hn].
            carried: from `mix`.
        """
        return v, carried

    def forward(self, x: Tensor | tuple[Tensor, ...], carried: Carried) -> Attended:
        """Normed x [b, s, h], or three -> output [b, s, h], what the next layer gets, is shown."""
        inputs = x if isinstance(x, tuple) else (x,) * 3
        s, hn = inputs[0].size(1), self.config.head_dim
        projections = zip((self.q_proj, self.k_proj, self.v_proj), inputs, strict=True)
        q, k, v = (w(x).unflatten(-1, (-1, hn)) for w, x in projections)
        k, v, carried, shown = self.mix(inputs[2], k, v, carried)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        v, carried = self.mix_normed(q, k, v, carried)
        q, k = apply_rope(q, self.config.rope_theta), apply_rope(k, self.config.rope_theta)
        k, v = (t.repeat_interleave(q.size(2) // t.size(2), dim=2) for t in (k, v))
        future = torch.full((s, s), float("-inf"), device=q.device).triu(1)
        scores = torch.einsum("bqnd,bknd->bnqk", q, k) * hn**-0.5 + future
        out = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v)  # [b, s, np, hn]
        return self.o_proj(out.flatten(2)), carried, shown


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: Any, layer: int, attention_class: type[Attention]) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention_class(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        h, ffn = config.hidden_size, config.intermediate_size
        self.mlp: Any = nn.Module()
        self.mlp.gate_proj, self.mlp.up_proj = (nn.Linear(h, ffn, bias=False) for _ in "gu")
        self.mlp.down_proj = nn.Linear(ffn, h, bias=False)

    def attend(self, x: Tensor, carried: Carried) -> Attended:
        """Norm and attention, without the residual."""
        return self.self_attn(self.input_layernorm(x), carried)

    def feed(self, x: Tensor) -> Tensor:
        """Norm and MLP, without the residual."""
        y = self.post_attention_layernorm(x)
        return self.mlp.down_proj(F.silu(self.mlp.gate_proj(y)) * self.mlp.up_proj(y))

    def forward(self, x: Tensor, carried: Carried) -> Attended:
        """Residual stream x [b, s, h] -> the same, what the next layer gets, what is shown."""
        out, carried, shown = self.attend(x, carried)
        x = x + out
        return x + self.feed(x), carried, shown


class Decoder(nn.Module):
    """Token ids [b, s] -> logits, loss and what is shown; named as in the exported folder."""

    config_class: ClassVar[type[TwinConfig]] = TwinConfig
    attention_class: ClassVar[type[Attention]] = Attention
    layer_class: ClassVar[type[Layer]] = Layer

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.model: Any = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(
            self.layer_class(config, n, self.attention_class)
            for n in range(config.num_hidden_layers)
        )
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():  # norms and scalars set themselves
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def start(self, input_ids: Tensor) -> Carried:
        """What layer 1 gets; input_ids: [b, s]."""
        return ()

    def finish(self, x: Tensor, carried: Carried) -> Tensor:
        """What the final norm gets, [b, s, h]."""
        return x

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> DecoderOutput:
        """Labels [b, s] stand beside the logits that predict them (shifted), -100 is ignored."""
        x, carried, shown = self.model.embed_tokens(input_ids), self.start(input_ids), []
        for layer in self.model.layers:
            x, carried, of_layer = layer(x, carried)
            shown += [] if of_layer is None else [of_layer]
        logits = self.lm_head(self.model.norm(self.finish(x, carried)))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return DecoderOutput(logits, loss, tuple(shown))
