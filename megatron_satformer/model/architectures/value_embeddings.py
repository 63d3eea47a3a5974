"""Gated value embeddings: values that read a table of their own at the token (nanochat).

    V'_n = V_n + 3 sigma(W_g,n x_n[:12]) E_n[token]

in every other layer n, the last one among them; x_n is the normed input of attention, the gate one
scalar per token and KV head, E_n [vocabulary, kv] the layer's own table. V' is what attention reads
and what the KV cache holds. It asks whether V_1, a function of the token alone, is more than a
look-up: the tables are more parameters than a small model has otherwise, for hardly any FLOPs.

Under tensor parallelism a table's columns and the gate's rows lie with their KV heads; what
the gate reads, 12 numbers a token, is gathered under sequence parallelism. The token ids are what
every stage needs: they come from the data (`Architecture.reads_tokens`) and nothing crosses a
boundary beside hidden_states.

Shapes: s sequence, b micro-batch, h hidden, ng KV heads, hn head dim, kv = ng hn; "/tp": per rank.
"""

from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.architectures.history import HistoryAttention, HistoryLayer
from megatron_satformer.model.architectures.record import Architecture, OwnTensor
from megatron_satformer.model.architectures.value_residual import refuse_split_heads
from megatron_satformer.model.gates import own_random_state
from megatron_satformer.unsupported import Row

TABLE, GATE = "value_embedding", "value_embedding_gate"
CHANNELS = 12  # of the input, that a gate reads
GATE_MOST = 3.0
GATE_INIT = 0.02
# nanochat's, where the trunk's optimizer is AdamW too: half the embedding's rate, and this decay.
NATIVE_LR_MULT, NATIVE_WEIGHT_DECAY = 0.5, 0.01


@dataclass
class ValueEmbeddingOptions:
    """Options of value embeddings."""

    value_embedding_init: Literal["uniform", "zero"] = field(
        default="uniform", metadata={"changeable": True}
    )
    """Where the tables of value_embeddings start: uniform, of standard deviation 1 / sqrt(h), or
    zero, which is a plain Transformer and learns: for --from-transformer."""

    value_embedding_rates: Literal["trunk", "native"] = field(
        default="trunk", metadata={"changeable": True}
    )
    """How the tables of value_embeddings learn. trunk: as all other matrices; native: half of --lr
    and --min-lr and a weight decay of 0.01, as published beside an embedding at --lr. A run goes on
    with what its optimizer's state was saved with."""


@dataclass
class ValueEmbeddingConfig(DecoderConfig, ValueEmbeddingOptions):
    """DecoderConfig with tables of values."""

    layers_alike: ClassVar[bool] = False  # every other one has a table
    architecture: str = "value_embeddings"
    padded_vocab_size: int | None = None
    """Rows of a table; as Megatron's argument, or set when the model is built."""

    @classmethod
    def check_options(cls, options: Any, *, num_layers: int, groups: int, tp: int) -> None:
        """Refuse heads that ranks would share."""
        refuse_split_heads(groups, tp, "value embeddings are")

    @property
    def summary(self) -> str:
        """As DecoderConfig's."""
        tables = sum(has_table(self, n) for n in range(1, self.num_layers + 1))
        return f"{self.architecture}, {tables} of {self.num_layers} layers have a table"

    @property
    def warning(self) -> str | None:
        """What is wrong with a Transformer's weights and random values beside its own."""
        if not self.from_transformer or self.value_embedding_init == "zero":
            return None
        return (
            f"value_embedding_init ({self.value_embedding_init}) with from_transformer (True): "
            "random tables do not start as that Transformer. Use --value-embedding-init zero."
        )


def has_table(options: Any, n: int) -> bool:
    """Whether layer n (1-based) has a table: every other one, and the last."""
    return n > 0 and (options.num_layers - n) % 2 == 0


def gate_channels(options: Any) -> int:
    """How many channels of its input a gate reads."""
    return min(CHANNELS, options.hidden_size)


class ValueEmbeddingAttention(HistoryAttention):
    """SelfAttention whose values read a table; what it holds for one call are the token ids."""

    config: ValueEmbeddingConfig

    def __init__(
        self,
        config: ValueEmbeddingConfig,
        submodules: Any,
        layer_number: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        self.has_table = has_table(config, layer_number)

    def add_table(self, rows: int) -> None:
        """Make table and gate, which need the size of the vocabulary."""
        if not self.has_table:
            return
        heads, hn = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        table = self._parameter(rows, heads * hn)  # [vocabulary, kv/tp]
        gate = self._parameter(heads, gate_channels(self.config))  # [ng/tp, 12]
        if self.config.perform_initialization:
            bound = (3 / self.config.hidden_size) ** 0.5
            with torch.no_grad(), own_random_state():
                if self.config.value_embedding_init == "uniform":
                    table.uniform_(-bound, bound)
                gate.uniform_(0.0, GATE_INIT)
        table.is_embedding_or_output_parameter = True  # no matrix to orthogonalise
        for parameter, axis in ((table, 1), (gate, 0)):
            set_tensor_model_parallel_attributes(parameter, True, axis, 1)
        self.register_parameter(TABLE, table)
        self.register_parameter(GATE, gate)

    def _parameter(self, *shape: int) -> Any:
        on_cpu = self.config.use_cpu_initialization
        device = None if on_cpu else torch.cuda.current_device()  # None: torch's default
        zeros = torch.zeros(shape, device=device, dtype=self.config.params_dtype)
        return torch.nn.Parameter(zeros)

    # SelfAttention.get_query_key_value_tensors, 0.19.2: the narrowest place where V is whole and
    # neither attention nor the KV cache has seen it.
    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        """As SelfAttention's, V with what the table has for the token."""
        query, key, value, *rest = super().get_query_key_value_tensors(
            hidden_states, *args, **kwargs
        )
        if self.has_table:
            (ids,) = self.history
            read = F.embedding(ids, self.value_embedding).transpose(0, 1)  # [s, b, kv/tp]
            read_by_gate = self._gate_input(hidden_states).to(self.value_embedding_gate.dtype)
            logits = F.linear(read_by_gate, self.value_embedding_gate)
            gate = GATE_MOST * torch.sigmoid(logits)  # [s, b, ng/tp], (0, 3)
            value = torch.addcmul(value, gate.unsqueeze(-1), read.unflatten(2, value.shape[2:]))
        return query, key, value, *rest

    def _gate_input(self, hidden_states: Tensor) -> Tensor:
        """The first channels of x_n, [s, b, 12]."""
        first = hidden_states[..., : gate_channels(self.config)]
        norm = getattr(self.linear_qkv, "layer_norm_weight", None)
        if norm is not None:  # Transformer Engine's linear_qkv norms its input itself
            square = hidden_states.float().square().mean(-1, keepdim=True)
            first = first * torch.rsqrt(square + self.config.layernorm_epsilon)
            first = first * norm[: first.size(-1)]
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(
                first.contiguous(), group=self.pg_collection.tp
            )
        return copy_to_tensor_model_parallel_region(first, group=self.pg_collection.tp)

    # Module-level sharded_state_dict, 0.19.2: parameters of the module itself count as replicated.
    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Megatron's entries, table and gate cut by head.

        The rows of a table are the vocabulary and its padding, which another layout may have less
        or more of, as the word embedding's.
        """
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.has_table:
            for name, axis in ((TABLE, 1), (GATE, 0)):
                entries[prefix + name] = make_tp_sharded_tensor_for_checkpoint(
                    getattr(self, name),
                    prefix + name,
                    axis,
                    prepend_offsets=sharded_offsets,
                    tp_group=self.pg_collection.tp,
                    dp_cp_group=metadata["dp_cp_group"],
                    allow_shape_mismatch=name == TABLE,
                )
        return entries


def add_tables(chunk: Any, place: int) -> None:
    """Give the layers of one chunk their tables, and hand them the token ids.

    Args:
        chunk: a GPTModel, not wrapped yet.
        place: its number in the model.
    """
    chunk.config.padded_vocab_size = chunk.vocab_size
    for layer in chunk.decoder.layers:
        layer.self_attention.add_table(chunk.vocab_size)
    given: list[Tensor] = []  # between the chunk's start and its decoder's

    def keep(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given[:] = [args[0] if args else kwargs["input_ids"]]

    def hand_on(_: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"context": (given.pop(),)}

    # GPTModel.forward (0.19.2) gives its decoder no ids.
    chunk.register_forward_pre_hook(keep, with_kwargs=True)
    chunk.decoder.register_forward_pre_hook(hand_on, with_kwargs=True)


def own_tensors(options: Any, n: int) -> list[OwnTensor]:
    """Table and gate of layer n."""
    if not has_table(options, n):
        return []
    heads = options.num_query_groups
    padded = getattr(options, "padded_vocab_size", None)
    rows = getattr(options, "vocab_size", 0) if padded is None else padded
    at, theirs = "self_attention", "self_attn"
    return [
        OwnTensor(
            f"{at}.{TABLE}",
            (f"{theirs}.{TABLE}.weight",),
            (rows, heads * options.kv_channels),
            "vocabulary",
        ),
        OwnTensor(f"{at}.{GATE}", (f"{theirs}.{GATE}.weight",), (heads, gate_channels(options))),
    ]


def describe_tables(config: Any) -> str:
    """How many tables there are and what they hold, for the card."""
    rows = [tensor.shape for _, tensor in VALUE_EMBEDDINGS.all_tensors(config)][::2]
    held = sum(vocabulary * kv for vocabulary, kv in rows)
    return f", of which {len(rows)} have a table; all tables hold {held:,} parameters"


def table_group(args: Namespace) -> dict[str, dict[str, float]]:
    """Tables at their native rate and decay, where asked for."""
    if args.value_embedding_rates == "trunk":
        return {}
    rates = {"max_lr": args.lr, "min_lr": args.min_lr}
    scaled = {n: rate * NATIVE_LR_MULT for n, rate in rates.items() if rate is not None}
    decay = NATIVE_WEIGHT_DECAY / args.weight_decay if args.weight_decay else 0.0
    return {f"*.{TABLE}": {"wd_mult": decay, **scaled}}


VALUE_EMBEDDINGS = Architecture(
    name="value_embeddings",
    source="nanochat, modded-nanogpt",
    equation=(
        "V'_n = V_n + 3 sigma(W_g,n x_n[:12]) E_n[token], in every other layer and the last\n"
        "E_n is a table of its own, the gate one scalar per token and KV head"
    ),
    about=(
        "The KV cache holds V', so decoding costs what it costs a plain Transformer. The tables "
        "hold most of the\nparameters of a small model, and a token reads one row of each: compare "
        "it with others by both numbers.\nGated value embeddings are published as code (nanochat)."
    ),
    twin="megatron_satformer.model.reference.value_embeddings:ValueEmbeddings",
    exported=(
        "megatron_satformer.checkpoint.exported.modeling_value_embeddings:"
        "ValueEmbeddingsForCausalLM"
    ),
    config=ValueEmbeddingConfig,
    options=ValueEmbeddingOptions,
    attention=ValueEmbeddingAttention,
    layer=HistoryLayer,
    reads_tokens=True,
    tensors=own_tensors,
    finish=add_tables,
    refuses=(
        Row("enable_cuda_graph external_cuda_graph", "token ids would have to be a static buffer"),
        Row("cuda_graph_impl", "token ids would have to be a static buffer", ("none",)),
        Row("use_megatron_fsdp use_torch_fsdp2", "it has not been tried with its tables"),
        Row("normalization", "its gates read the norm's output", ("RMSNorm",)),
        Row("apply_layernorm_1p layernorm_zero_centered_gamma", "its gates read the norm's output"),
    ),
    parameter_groups=table_group,
    from_transformer=None,
    layers_note=describe_tables,
    gates="3 sigma(W_g x) [batch, sequence, KV heads] of\neach layer that has a table",
)
