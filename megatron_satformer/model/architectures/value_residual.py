"""What SATFormer and ResFormer share: values that may read V1, the value projection of layer 1.

Megatron's SelfAttention and TransformerLayer do everything; this file only hands V1 from layer to
layer, in and out of one call of attention, and lets an architecture blend it into V before
attention and KV cache see V. Must not know: pipeline stages, gates.

Shapes: s sequence, b micro-batch, ng KV heads, hn head dim; "/tp" marks what a rank holds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.architectures.record import Carry
from megatron_satformer.model.attention import DecoderAttention
from megatron_satformer.unsupported import Row

_STATIC = "V1 would have to be a static buffer"
# Megatron's options that cannot be used where V1 is carried.
REFUSES = (
    Row("fine_grained_activation_offloading", "it frees layer 1's values, which are V1, after use"),
    Row("cpu_offloading_num_layers", "V1 outlives the layers whose activations it moves away"),
    Row("enable_cuda_graph external_cuda_graph", _STATIC),
    Row("cuda_graph_impl", _STATIC, ("none",)),
)


@dataclass
class ValueResidualOptions:
    """Options of the architectures that add V1 to the values of later layers."""

    value_residual_last_k: int | None = None
    """Mix V1 into the last k layers only, 1 <= k <= num_layers - 1. Default: into all but the
    first."""

    v1_transport: Literal["carry", "recompute"] = field(
        default="carry", metadata={"changeable": True}
    )
    """How V1 reaches later pipeline stages: sent along with hidden states, or computed again on
    each from the token ids, by replicas of the embedding and of what layer 1 has for it."""


def mixes(options: Any, n: int) -> bool:
    """Whether layer n (1-based) mixes V1 into its values; n = 0 stands for no layer."""
    last_k = options.value_residual_last_k or options.num_layers - 1
    return n > max(1, options.num_layers - last_k)


def describe_mixing(config: Any) -> str:
    """Which layers mix, for the card."""
    mixing = [n for n in range(1, config.num_layers + 1) if mixes(config, n)]
    return f", of which mix V_1: {mixing[0]} to {mixing[-1]}"


def carry_v1(config: DecoderConfig, n: int) -> Carry:
    """V1 crosses every boundary between layers, unless every stage makes it."""
    return Carry(heads=1) if config.v1_transport == "carry" else Carry()


# What V1 made from token ids alone cannot have: option, values that it can, why.
_NOT_FROM_IDS = (
    ("position_embedding_type", ("rope", "none", "yarn"), "positions are added to embeddings"),
    ("hidden_dropout", (0.0,), "embeddings are dropped, on each stage others"),
    ("transformer_impl", (None, "local"), "Transformer Engine's linear_qkv holds the norm"),
    ("optimizer", ("adam", "sgd"), "replicas have been tried with no other"),
    ("ckpt_format", ("torch_dist",), "other checkpoints would hold the replicas too"),
    ("use_mup", (False,), "replicas have not been tried with it"),
    ("use_megatron_fsdp", (False,), "it would shard replicas apart"),
    ("use_torch_fsdp2", (False,), "it would shard replicas apart"),
)


def refuse_beside_replicas(options: Any) -> None:
    """Refuse what cannot be used where every stage makes V1.

    Args:
        options: a config, or parsed arguments.

    Raises:
        ValueError: naming the option and the way out.
    """
    if getattr(options, "v1_transport", "carry") != "recompute":
        return
    for option, values, why in _NOT_FROM_IDS:
        value = getattr(options, option, values[0])
        if value not in values:
            allowed = " or ".join(str(v) for v in values if v is not None)
            raise ValueError(
                f"{option} ({value}) must be {allowed} with v1_transport (recompute): {why}. "
                "Change it, or use --v1-transport carry."
            )


def refuse_split_heads(groups: int, tp: int, carried: str) -> None:
    """Refuse tensor-parallel ranks that share a KV head.

    Args:
        groups: KV heads of the model.
        tp: tensor-parallel size.
        carried: what is sharded by KV head, and its verb.

    Raises:
        ValueError: naming the sizes that there are.
    """
    if groups % tp:
        sizes = [str(n) for n in range(1, groups + 1) if groups % n == 0]
        raise ValueError(
            f"num_query_groups ({groups}) must be a multiple of tensor_model_parallel_size "
            f"({tp}): {carried} sharded by KV head. Use TP {' or '.join(sizes)}."
        )


def replica_defaults(preview: Any) -> dict[str, Any]:
    """Defaults of other flags where replicas have buckets of their own.

    Megatron's other format of the distributed optimizer's state keeps every bucket, so replicas'
    too, and dies of one of which a data-parallel rank holds padding alone.
    """
    small = preview.v1_transport == "recompute" and preview.use_distributed_optimizer
    return {"dist_ckpt_optim_fully_reshardable": True} if small else {}


@dataclass
class ValueResidualConfig(DecoderConfig, ValueResidualOptions):
    """DecoderConfig of a model whose layers read V1."""

    layers_alike: ClassVar[bool] = False  # layer 1 mixes nothing in

    @classmethod
    def check_options(cls, options: Any, *, num_layers: int, groups: int, tp: int) -> None:
        """Refuse depths and tensor-parallel sizes that V1 cannot serve."""
        last_k = options.value_residual_last_k
        if last_k is not None and not 1 <= last_k < num_layers:
            raise ValueError(
                f"value_residual_last_k ({last_k}) must be at least 1 and less than num_layers "
                f"({num_layers}). Leave it out to mix into every layer but the first."
            )
        if num_layers < 2:
            raise ValueError(
                f"num_layers ({num_layers}) must be at least 2 for architecture "
                f"({options.architecture}): layer 1 makes V1 and later layers mix it in."
            )
        refuse_split_heads(groups, tp, "V1 is")
        refuse_beside_replicas(options)

    def mixes(self, n: int) -> bool:
        """Whether layer n (1-based) mixes V1 into its values."""
        return mixes(self, n)

    @property
    def num_mixing_layers(self) -> int:
        """Number of layers that mix V1 in."""
        return sum(self.mixes(n) for n in range(1, self.num_layers + 1))

    @property
    def summary(self) -> str:
        """As DecoderConfig's."""
        return f"{self.architecture}, {self.num_mixing_layers} of {self.num_layers} layers mix V1"


class ValueResidualAttention(DecoderAttention):
    """DecoderAttention that makes V1 in layer 1 and blends it into V in the layers that mix.

    An architecture subclasses it and implements `blend`.
    """

    config: ValueResidualConfig

    def __init__(
        self,
        config: ValueResidualConfig,
        submodules: Any,
        layer_number: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        self.makes_v1 = layer_number == 1
        self.mixes = config.mixes(layer_number)
        self._v1: Tensor | None = None

    def blend(self, value: Tensor, v1: Tensor) -> Tensor:
        """V' from V and V1, all [s, b, ng/tp, hn]."""
        raise NotImplementedError

    @contextmanager
    def holding(self, v1: Tensor | None) -> Iterator["ValueResidualAttention"]:
        """Hold V1 for the duration of one call; `self.v1` is what the next layer gets.

        Nothing stays on the module afterwards, so no memory is held and a recomputed or
        interleaved micro-batch meets its own V1 only.
        """
        self._v1 = v1
        try:
            yield self
        finally:
            self._v1 = None

    @property
    def v1(self) -> Tensor:
        """V1 [s, b, ng/tp, hn] inside `holding`."""
        assert self._v1 is not None, f"layer {self.layer_number} was not handed V1"
        return self._v1

    def finish_value(self, value: Tensor) -> Tensor:
        """As DecoderAttention's, V blended; layer 1 keeps V as V1."""
        if self.makes_v1:
            # One contiguous copy feeds both layer 1's attention and the carry: a slice would
            # keep layer 1's whole QKV buffer alive until the last backward.
            self._v1 = value = value.contiguous()
            return value
        return self.blend(value, self.v1) if self.mixes else super().finish_value(value)


class ValueResidualLayer(TransformerLayer):
    """TransformerLayer over a ValueResidualAttention; `context` is (V1,) behind layer 1."""

    # TransformerLayer._forward_attention, 0.19.2: it does not hand `context` to self-attention.
    def _forward_attention(
        self,
        hidden_states: Tensor,
        *args: Any,
        context: tuple[Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, tuple[Tensor] | None]:
        """Attention half of the layer.

        Args:
            hidden_states: [s, b, h] ([s/tp, b, h] under sequence parallelism).
            *args: as Megatron's.
            context: V1 [s, b, ng/tp, hn], None in layer 1.
            **kwargs: as Megatron's.

        Returns:
            hidden_states as given, and V1 for the next layer; None where no stage carries it on
            and no layer of this one reads it.
        """
        handed_on = context is not None or self.self_attention.makes_v1
        with self.self_attention.holding(context[0] if context else None) as attention:
            hidden_states, _ = super()._forward_attention(hidden_states, *args, **kwargs)
            return hidden_states, (attention.v1,) if handed_on else None
