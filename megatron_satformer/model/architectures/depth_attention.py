"""Depth-Attention: values of earlier layers, by a softmax over depth (arXiv 2606.05014).

    V'_n = sum_j w_j V'_j + w_n V_n    over j in J_n = {1, 1 + t, 1 + 2 t, ..}, j < n;  V'_1 = V_1
    w    = softmax over J_n and n of qbar_n . k_j / sqrt(hn)

per token and KV head, t the stride, qbar_n the mean of the queries that read the head. There are no
parameters. k_j is the key that layer j attends with, normed by its own QK-norm and without RoPE:
where norms come before RoPE, as here, both sides of a product are rotated alike and it would not
change. The authors' code norms keys behind RoPE, and in its eager path scores every query head with
the reading layer's key norm; which of the two their published figures are of is not known.

V' is what attention reads and what the KV cache holds: V'_j of a token is known when the token is
read, so decoding computes what training does. (The authors' code caches V_n.) Everything stays
with its head: no collective.

Shapes: s sequence, b micro-batch, np query heads, ng KV heads, hn head dim; "/tp": per rank.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.architectures.extended import REFUSES
from megatron_satformer.model.architectures.history import HistoryAttention, HistoryLayer
from megatron_satformer.model.architectures.record import Architecture, Carry
from megatron_satformer.model.architectures.value_residual import refuse_split_heads
from megatron_satformer.model.mixing import dots, weighted_sum
from megatron_satformer.unsupported import Row


@dataclass
class DepthAttentionOptions:
    """Depth-Attention's own options."""

    depth_attention_stride: int | None = None
    """Later layers read the first layer, and from there every how many-th one (depth_attention).
    Default: half of num_layers, rounded down, as published."""


@dataclass
class DepthAttentionConfig(DecoderConfig, DepthAttentionOptions):
    """DecoderConfig of a model whose layers read values of earlier ones by their keys."""

    architecture: str = "depth_attention"

    @classmethod
    def check_options(cls, options: Any, *, num_layers: int, groups: int, tp: int) -> None:
        """Refuse a model that reads no earlier layer, and heads that ranks would share."""
        if num_layers < 2:
            raise ValueError(
                f"num_layers ({num_layers}) must be at least 2 for architecture "
                f"({options.architecture}): layer 1 reads its own values alone."
            )
        stride = options.depth_attention_stride
        if stride is not None and not 1 <= stride < num_layers:
            raise ValueError(
                f"depth_attention_stride ({stride}) must be at least 1 and less than num_layers "
                f"({num_layers}). Leave it out for {num_layers // 2}."
            )
        refuse_split_heads(groups, tp, "keys and values are")

    @property
    def summary(self) -> str:
        """As DecoderConfig's."""
        read = [str(n) for n in range(1, self.num_layers) if is_source(self, n)]
        return f"{self.architecture}, later layers read {', '.join(read)}"


def is_source(options: Any, n: int) -> bool:
    """Whether the layers behind layer n (1-based) read it."""
    stride = options.depth_attention_stride or options.num_layers // 2
    return n < options.num_layers and (n - 1) % stride == 0


class DepthAttention(HistoryAttention):
    """HistoryAttention that mixes values of earlier layers into its own by their keys."""

    config: DepthAttentionConfig

    # SelfAttention.get_query_key_value_tensors, 0.19.2: the narrowest place where Q and K are
    # normed, and neither RoPE, attention nor the KV cache has seen them.
    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """As SelfAttention's, V mixed; a layer that later ones read hands on K and V'."""
        query, key, value, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        source = is_source(self.config, self.layer_number)
        if source:
            # Slices would keep the layer's whole QKV buffer alive until the last backward.
            key = key.contiguous()
            value = value.contiguous()
        if self.history:
            value = self._mix(query, key, value)
        if source:
            self._history = (*self.history, key, value)
        return query, key, value, *rest

    def _mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """V' [s, b, ng/tp, hn] of this layer."""
        keys, values = self.history[0::2], self.history[1::2]
        heads, hn = key.shape[2:]
        qbar = query.unflatten(2, (heads, -1)).mean(3)  # [s, b, ng/tp, hn]
        weights = (dots(qbar, [*keys, key]) * hn**-0.5).softmax(-1)  # [s, b, ng/tp, sources + 1]
        return weighted_sum(weights, [*values, value], fused=self.config.fused_blend)


def carry(options: Any, n: int) -> Carry:
    """K and V' of every layer so far that later ones read."""
    return Carry(heads=2 * sum(is_source(options, layer) for layer in range(1, n + 1)))


_OPEN = "a softmax gives earlier layers their share of every value from the start"
DEPTH_ATTENTION = Architecture(
    name="depth_attention",
    source="arXiv 2606.05014",
    equation=(
        "V'_n = sum_j w_j V'_j + w_n V_n, w = softmax_j(qbar_n . k_j / sqrt(hn))\n"
        "over layers j = 1, 1 + t, 1 + 2 t .. before n, and n itself; t = "
        "{config.source_stride}"
    ),
    about=(
        "qbar_n is the mean of the queries that read a KV head, k_j the normed key of layer j "
        "without RoPE; there\nare no parameters. The KV cache holds V', so decoding costs what it "
        "costs a plain Transformer.\nDepth-Attention is described in arXiv 2606.05014."
    ),
    twin="megatron_satformer.model.reference.depth_attention:DepthAttention",
    exported=(
        "megatron_satformer.checkpoint.exported.modeling_depth_attention:DepthAttentionForCausalLM"
    ),
    config=DepthAttentionConfig,
    options=DepthAttentionOptions,
    attention=DepthAttention,
    layer=HistoryLayer,
    carry=carry,
    refuses=(
        *REFUSES,
        Row("qk_clip", "it scales queries and keys, by which values of layers are weighed"),
    ),
    plain_start=lambda options: f"{_OPEN}.",
    from_transformer=_OPEN,
)
