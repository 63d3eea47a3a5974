"""V1 without a way through the pipeline: every chunk makes it from the token ids.

V1 depends on the token alone: V1 = W_v,1 norm(E[token]). With --v1-transport recompute a chunk
behind layer 1 whose layers mix has replicas of the embedding, of layer 1's norm and of its
linear_qkv, of which the rows of V alone are used. Their gradients are summed over the pipeline,
with those of the originals; each then takes the same step. Where embedding and output weight are
tied, the last stage has its copy already.

Shapes: s sequence, b micro-batch, h hidden, ng KV heads, hn head dim; "/tp": per rank.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.norm import build_norm

EMBEDDING = "embedding.word_embeddings.weight"
# Modules of V1Source: where layer 1 has the originals, and a checkpoint, as Transformer Engine's.
IN_LAYER_1 = {
    "input_layernorm": ("input_layernorm", "self_attention.linear_qkv.layer_norm_"),
    "linear_qkv": ("self_attention.linear_qkv", "self_attention.linear_qkv."),
}


def makes_v1_everywhere(config: DecoderConfig) -> bool:
    """Whether V1 is made in every chunk that reads it."""
    return getattr(config, "v1_transport", None) == "recompute"


def replicate_v1(chunks: list[GPTModel]) -> None:
    """Give the chunks of this rank what makes V1, equal on all stages, and keep it so.

    Args:
        chunks: not wrapped yet.
    """
    config, stages = chunks[0].config, chunks[0].pg_collection.pp
    if not makes_v1_everywhere(config) or stages.size() == 1:
        return
    for chunk in chunks:
        numbers = [layer.layer_number for layer in chunk.decoder.layers]
        if 1 not in numbers and any(config.mixes(n) for n in numbers):
            place = (chunk.vp_stage or 0) * stages.size() + stages.rank()
            chunk.v1_source = V1Source(chunk, place).to(torch.cuda.current_device())
            _feed(chunk)
    copies = Copies(chunks, stages)
    copies.make_equal()

    def finalize(model: list[Any], *args: Any, **kwargs: Any) -> None:
        finalize_model_grads(model, *args, **kwargs)
        copies.sum_gradients()

    config.finalize_model_grads_func = finalize


class _ValueRows(ColumnParallelLinear):
    """Layer 1's linear_qkv, of which the rows of V are computed: [s, b, h] -> [s, b, ng/tp, hn]."""

    def __init__(self, config: DecoderConfig, tp_group: ProcessGroup) -> None:
        queries = config.kv_channels * config.num_attention_heads
        gated = 2 if config.attention_output_gate else 1
        super().__init__(
            config.hidden_size,
            gated * queries + 2 * config.kv_projection_size,
            config=config,
            init_method=config.init_method,
            bias=config.add_bias_linear or config.add_qkv_bias,
            skip_bias_add=True,
            tp_group=tp_group,
        )
        self.heads = config.num_query_groups // tp_group.size(), config.kv_channels
        # What it multiplies by is a part of the weight, and has no main_grad to be added to.
        self.gradient_accumulation_fusion = False
        self.output_size_per_partition = self.heads[0] * self.heads[1]

    def forward(self, normed: Tensor) -> Tensor:
        """As layer 1's own values."""
        values, _ = super().forward(normed, weight=self._rows(self.weight))
        if self.bias is not None:
            values = values + self._rows(self.bias)
        return values.unflatten(-1, self.heads)

    def _rows(self, rows: Tensor) -> Tensor:
        """The last hn rows of every KV group."""
        groups, hn = self.heads
        return rows.unflatten(0, (groups, -1))[:, -hn:].flatten(0, 1)


class V1Source(MegatronModule):
    """What makes V1 from token ids in one chunk.

    Args:
        chunk: that gets it; the last one lends its tied output weight.
        place: number of the chunk in the model; not 0.
    """

    def __init__(self, chunk: GPTModel, place: int) -> None:
        config, tp_group = chunk.config, chunk.pg_collection.tp
        super().__init__(config)
        self.place, self.tp_group = place, tp_group
        self.embedding = LanguageModelEmbedding(
            config, chunk.vocab_size, chunk.max_sequence_length, "rope", tp_group=tp_group
        )
        tied = _tied_output(chunk)
        if tied is not None:
            self.embedding.word_embeddings.weight = tied
        self.input_layernorm = build_norm(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )
        self.linear_qkv = _ValueRows(config, tp_group)
        self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True
        for parameter in self.parameters():
            parameter.shared = True  # counted once in the gradient norm

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [b, s] -> V1 [s, b, ng/tp, hn]."""
        return self.linear_qkv(self.input_layernorm(self.embedding(ids, None)))

    # MegatronModule.sharded_state_dict, 0.19.2: under the originals' keys, as replicas of them.
    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Entries that are read wherever the originals are, and never saved."""
        metadata = metadata or {}
        apart = self.config.hetereogenous_dist_checkpoint or any(
            metadata.get(kind) for kind in ("non_homogeneous_layers", "singleton_local_shards")
        )
        layer = "decoder.layers.0." if apart else "decoder.layers."
        offsets: tuple = () if apart else ((0, 0, self.config.num_layers),)
        places: list[tuple[str, str, tuple]] = [("embedding", "embedding.", ())]
        places += [(name, f"{layer}{key}", offsets) for name, (_, key) in IN_LAYER_1.items()]
        entries: ShardedStateDict = {}
        for name, key, axes in places:
            mine = f"{prefix}{name}."
            found = sharded_state_dict_default(
                getattr(self, name), mine, axes, metadata, tp_group=self.tp_group
            )
            found = {k: v for k, v in found.items() if isinstance(v, ShardedTensor)}
            replace_prefix_for_sharding(found, mine, key)
            entries |= found
        for entry in entries.values():
            entry.replica_id = (self.place, *entry.replica_id[1:])
        return entries


def _feed(chunk: GPTModel) -> None:
    """Let a chunk make V1 from its ids, and give it to its first layer."""
    made: list[Tensor] = []

    def make(chunk: GPTModel, args: tuple, kwargs: dict[str, Any]) -> None:
        made[:] = [chunk.v1_source(args[0] if args else kwargs["input_ids"])]

    # GPTModel (0.19.2) gives its TransformerBlock everything by name, and no context.
    def hand_in(_: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"context": (made.pop(),)}

    chunk.register_forward_pre_hook(make, with_kwargs=True)
    chunk.decoder.register_forward_pre_hook(hand_in, with_kwargs=True)


class Copies:
    """Originals and replicas of one model, by name, on this rank and on the other stages.

    Args:
        chunks: of this rank.
        stages: the pipeline's group.
    """

    def __init__(self, chunks: list[GPTModel], stages: ProcessGroup) -> None:
        self.stages = stages
        self.here: dict[str, list[Any]] = {}  # parameters
        self.tied: list[Any] = []
        originals = set()
        for chunk in chunks:
            for name, parameter in _originals(chunk):
                originals.add(name)
                self.here.setdefault(name, []).append(parameter)
            tied = _tied_output(chunk)
            if tied is not None:
                self.tied.append(tied)
                self.here.setdefault(EMBEDDING, []).append(tied)
            source = getattr(chunk, "v1_source", None)
            for name, parameter in source.named_parameters() if source is not None else ():
                if parameter is not tied:
                    self.here.setdefault(name, []).append(parameter)
        for parameter in (p for copies in self.here.values() for p in copies):
            # A bucket of its own, so that the distributed optimizer shards it alike on all stages.
            parameter.shared_embedding = True
        has = {name: (copies[0].shape, name in originals) for name, copies in self.here.items()}
        every: list[Any] = [None] * stages.size()
        torch.distributed.all_gather_object(every, has, group=stages)
        self.shapes = {name: shape for stage in every for name, (shape, _) in stage.items()}
        self.owners = {
            name: next(rank for rank, stage in enumerate(every) if stage.get(name, (0, 0))[1])
            for name in sorted(self.shapes)
        }

    @torch.no_grad()
    def make_equal(self) -> None:
        """Every copy becomes what the original is."""
        for name, owner in self.owners.items():
            copies = [parameter.data for parameter in self.here.get(name, ())]
            value = copies[0] if copies else self._nothing(name)
            source = torch.distributed.get_global_rank(self.stages, owner)
            torch.distributed.broadcast(value, source, group=self.stages)
            for copy in copies[1:]:
                copy.copy_(value)

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Every copy's gradient becomes the sum of all, behind Megatron's own reductions."""
        for parameter in self.tied:
            parameter.main_grad.zero_()  # Megatron has added it to the embedding's already
        for name in self.owners:
            first, *others = [p.main_grad for p in self.here.get(name, ())] or [self._nothing(name)]
            for other in others:
                first.add_(other)
            torch.distributed.all_reduce(first, group=self.stages)
            for other in others:
                other.copy_(first)

    def _nothing(self, name: str) -> Tensor:
        """Zeros, on a stage without a copy."""
        return torch.zeros(self.shapes[name], device=torch.cuda.current_device())


def _originals(chunk: GPTModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    if chunk.pre_process:
        yield EMBEDDING, chunk.embedding.word_embeddings.weight
    for layer in (layer for layer in chunk.decoder.layers if layer.layer_number == 1):
        for module, (place, _) in IN_LAYER_1.items():
            for name, parameter in layer.get_submodule(place).named_parameters():
                yield f"{module}.{name}", parameter


def _tied_output(chunk: GPTModel) -> torch.nn.Parameter | None:
    """The output weight, where it is the embedding's copy on another chunk."""
    ties = chunk.share_embeddings_and_output_weights
    return chunk.output_layer.weight if chunk.post_process and ties else None
