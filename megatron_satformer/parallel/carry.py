"""V1 across pipeline stages: pack, unpack, width.

Between stages travels one tensor, [hidden | V1] along the last axis, so Megatron's schedules,
recompute and TransformerBlock stay as they are, and V1's gradient comes back by plain autograd.
The same tensor-parallel rank packs and unpacks, so any bijection of the V1 elements will do:

    without sequence parallel   hidden [s, b, h],     V1 [s, b, kv/tp]                 h + kv/tp
    with sequence parallel      hidden [s/tp, b, h],  V1 viewed as [s/tp, b, kv]       h + kv

Shapes: s sequence, b micro-batch, h hidden, ng KV heads, hn head dim, kv = ng * hn; "/tp": per
rank.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import get_pg_rank
from torch import Tensor

from megatron_satformer.config import SATFormerConfig
from megatron_satformer.model.layer import ValueResidualLayer


def packed_width(config: SATFormerConfig) -> int:
    """Last axis of what crosses a stage boundary: h for transformer, h + kv or h + kv/tp else."""
    return config.hidden_size + carried_width(config)


def carried_width(config: SATFormerConfig) -> int:
    """Elements of V1 per row of the packed tensor, on one tensor-parallel rank."""
    if config.architecture == "transformer":
        return 0
    if config.sequence_parallel:
        return config.kv_projection_size
    return config.kv_projection_size // config.tensor_model_parallel_size


def pack(hidden_states: Tensor, v1: Tensor) -> Tensor:
    """[hidden | V1].

    Args:
        hidden_states: [s, b, h], or [s/tp, b, h] under sequence parallelism.
        v1: [s, b, ng/tp, hn].

    Returns:
        [s, b, h + kv/tp], or [s/tp, b, h + kv] under sequence parallelism.
    """
    rows, batch, _ = hidden_states.shape
    return torch.cat([hidden_states, v1.reshape(rows, batch, -1)], dim=-1)


def unpack(packed: Tensor, config: SATFormerConfig) -> tuple[Tensor, Tensor]:
    """Inverse of `pack`; both results are contiguous and free of the packed buffer.

    Args:
        packed: as `pack` returns it.
        config: gives h, hn and the parallel sizes.

    Returns:
        hidden_states and v1, as `pack` takes them.
    """
    hidden_states, flat = packed.split([config.hidden_size, carried_width(config)], dim=-1)
    groups = config.num_query_groups // config.tensor_model_parallel_size
    v1 = flat.reshape(-1, packed.size(1), groups, config.kv_channels)
    return hidden_states.contiguous(), v1.contiguous()


def check_stages(config: SATFormerConfig) -> None:
    """Refuse pipeline stages that could not carry V1.

    Args:
        config: the model; no process group is needed.

    Raises:
        NotImplementedError: a stage without layers, or a ResFormer rank without a layer that mixes.
    """
    if config.architecture == "transformer" or config.pipeline_model_parallel_layout is not None:
        return
    virtual = config.virtual_pipeline_model_parallel_size
    for rank in range(config.pipeline_model_parallel_size):
        held: list[int] = []
        for stage in [None] if virtual is None else range(virtual):
            count = get_num_layers_to_build(config, stage, rank)
            first = get_transformer_layer_offset(config, stage, rank) + 1
            held += range(first, first + count)
            if count < 1:
                raise NotImplementedError(
                    f"pipeline_model_parallel_size ({config.pipeline_model_parallel_size}) leaves "
                    f"pipeline rank {rank} a stage without layers, which cannot pack V1 yet. Give "
                    f"every stage one of the num_layers ({config.num_layers})."
                )
        if config.architecture == "resformer" and not any(map(config.mixes, held)):
            raise NotImplementedError(
                f"pipeline_model_parallel_size ({config.pipeline_model_parallel_size}) leaves "
                f"pipeline rank {rank} layers {held} of resformer, none of which mixes V1: its "
                "share of the common lambdas' gradient would be missing. Use fewer stages, or a "
                "larger --value-residual-last-k."
            )


class StageLayer(ValueResidualLayer):
    """ValueResidualLayer that unpacks at the entry of a pipeline chunk and packs at its exit."""

    def __init__(self, config: SATFormerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        local_number = kwargs["layer_number"]
        pp_rank = get_pg_rank(self.pg_collection.pp)
        last_number = get_num_layers_to_build(config, kwargs.get("vp_stage"), pp_rank)
        self.enters = local_number == 1 and self.layer_number > 1
        self.leaves = local_number == last_number and self.layer_number < config.num_layers

    # TransformerLayer.forward, 0.19.2: the narrowest place that sees the layer's whole input and
    # output; inside it also under recompute, so the packed tensor is what gets checkpointed.
    def forward(
        self, hidden_states: Tensor, *args: Any, context: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As TransformerLayer.forward; `context` is V1, [s, b, ng/tp, hn]."""
        if self.enters:
            hidden_states, context = unpack(hidden_states, self.config)
        hidden_states, v1 = super().forward(hidden_states, *args, context=context, **kwargs)
        if self.leaves:
            return pack(hidden_states, v1), None
        return hidden_states, v1
