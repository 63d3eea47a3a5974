"""MeanFormer, made up for the tests: every layer reads the mean of all earlier values, and X_0.

    H_n  = X_{n-1} + skip_n X_0                        n = 2..L, X_0 the embedding
    V'_n = V_n + scale beta_n mean(V_1 .. V_{n-1})

It carries a stream, X_0, and a growing number of KV-head tensors, so every boundary of a pipeline
has its own width. docs/adding_an_architecture.md walks through this file.

Shapes: s sequence, b micro-batch, h hidden, ng KV heads, hn head dim; "/tp": per rank.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.architectures.record import Architecture, Carry, OwnTensor
from megatron_satformer.model.coefficients import (
    head_coefficients,
    stream_coefficients,
    summed_over_heads,
)
from megatron_satformer.model.reference import decoder


@dataclass
class MeanFormerOptions:
    """Its own options: flags of pretrain_satformer.py, keys of the exported config.json."""

    mean_scale: float = 1.0
    """Factor of the mean of earlier values."""

    mean_init: float = field(default=0.3, metadata={"changeable": True})
    """Where beta and skip start; 0 starts as a plain Transformer."""


@dataclass
class MeanFormerConfig(DecoderConfig, MeanFormerOptions):
    """DecoderConfig with the options."""

    layers_alike: ClassVar[bool] = False  # layer 1 reads nothing
    architecture: str = "meanformer"

    @classmethod
    def check_options(cls, options: Any, *, num_layers: int, groups: int, tp: int) -> None:
        """Values are sharded by KV head."""
        if groups % tp:
            raise ValueError(
                f"num_query_groups ({groups}) must be a multiple of tensor_model_parallel_size "
                f"({tp}): the values carried are sharded by KV head. Use another TP."
            )


class MeanAttention(SelfAttention):
    """SelfAttention that reads earlier values and adds its own to them."""

    def __init__(self, config: MeanFormerConfig, submodules: Any, layer_number: int, *args, **kw):
        super().__init__(config, submodules, layer_number, *args, **kw)
        self.values: tuple[Tensor, ...] | None = None
        if layer_number > 1:
            self.beta = head_coefficients(config, config.mean_init)  # [1]

    def get_query_key_value_tensors(self, *args, **kwargs):
        query, key, value, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        earlier, own = self.values, value.contiguous()  # [s, b, ng/tp, hn]
        self.values = (*earlier, own)
        if earlier:
            beta = summed_over_heads(self.beta, self.pg_collection.tp) * self.config.mean_scale
            own = own + beta * torch.stack(earlier).mean(0)
        return query, key, own, *rest


class MeanLayer(TransformerLayer):
    """TransformerLayer whose `context` is (X_0, V_1, .., V_n) behind layer n."""

    def __init__(self, config: MeanFormerConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if self.layer_number > 1:
            self.skip = stream_coefficients(config, config.mean_init)  # [1]

    def forward(self, hidden_states: Tensor, *args, context=None, **kwargs):
        """As TransformerLayer's; nothing stays on the attention after the call."""
        embedding, *values = context or (hidden_states,)
        if context:
            hidden_states = hidden_states + self.skip * embedding
        attention = self.self_attention
        attention.values = tuple(values)
        try:
            hidden_states, _ = super().forward(hidden_states, *args, **kwargs)
            return hidden_states, (embedding, *attention.values)
        finally:
            attention.values = None


class TwinAttention(decoder.Attention):
    """The plain twin's attention."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        if layer:
            self.beta = nn.Parameter(torch.full((1,), 0.3))

    def mix(self, x, k, v, carried):
        embedding, *values = carried
        mixed = v
        if values:
            mixed = v + self.config.mean_scale * self.beta * torch.stack(values).mean(0)
        return k, mixed, (embedding, *values, v), None


class TwinLayer(decoder.Layer):
    """The plain twin's layer."""

    def __init__(self, config: Any, layer: int, attention_class: type) -> None:
        super().__init__(config, layer, attention_class)
        if layer:
            self.skip = nn.Parameter(torch.full((1,), 0.3))

    def forward(self, x, carried):
        if carried:
            return super().forward(x + self.skip * carried[0], carried)
        return super().forward(x, (x,))


@dataclass
class TwinConfig(decoder.TwinConfig):
    """Shape and options of the twin."""

    mean_scale: float = 1.0


class MeanFormer(decoder.Decoder):
    """The plain twin."""

    config_class = TwinConfig
    attention_class = TwinAttention
    layer_class = TwinLayer


def carry(config: Any, n: int) -> Carry:
    """X_0, and the values of all layers so far."""
    return Carry(streams=1, heads=n)


def own_tensors(options: Any, n: int) -> list[OwnTensor]:
    """Two scalars of every layer but the first."""
    if n < 2:
        return []
    return [
        OwnTensor("self_attention.beta", ("self_attn.beta",), (1,), fp32=True),
        OwnTensor("skip", ("skip",), (1,), fp32=True),
    ]


MEANFORMER = Architecture(
    name="meanformer",
    source="tests/architectures/meanformer.py",
    equation="V'_n = V_n + {config.mean_scale} beta_n mean(V_1 .. V_{{n-1}})",
    about="It was made up.",
    twin="tests.architectures.meanformer:MeanFormer",
    exported="tests.architectures.modeling_meanformer:MeanFormerForCausalLM",
    config=MeanFormerConfig,
    options=MeanFormerOptions,
    attention=MeanAttention,
    layer=MeanLayer,
    carry=carry,
    tensors=own_tensors,
)
