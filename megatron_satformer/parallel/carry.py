"""V1 across pipeline stages: pack, unpack, and which boundary is how wide.

Between stages travels one tensor, [hidden | V1] along the last axis, so Megatron's schedules,
recompute and TransformerBlock stay as they are, and V1's gradient comes back by plain autograd.
The same tensor-parallel rank packs and unpacks, so any bijection of the V1 elements will do:

    without sequence parallel   hidden [s, b, h],     V1 [s, b, kv/tp]                 h + kv/tp
    with sequence parallel      hidden [s/tp, b, h],  V1 viewed as [s/tp, b, kv]       h + kv

A chunk is what one rank runs in one go: a pipeline stage, or one of its virtual stages.

Shapes: s sequence, b micro-batch, h hidden, ng KV heads, hn head dim, kv = ng * hn; "/tp": per
rank.
"""

from itertools import accumulate, pairwise

import torch
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from torch import Tensor

from megatron_satformer.config import SATFormerConfig


def packed_width(config: SATFormerConfig) -> int:
    """Last axis of [hidden | V1] on one rank: h for transformer, h + kv or h + kv/tp else."""
    return config.hidden_size + carried_width(config)


def carried_width(config: SATFormerConfig) -> int:
    """Elements of V1 per row of the packed tensor, on one tensor-parallel rank."""
    if config.architecture == "transformer":
        return 0
    if config.sequence_parallel:
        return config.kv_projection_size
    return config.kv_projection_size // config.tensor_model_parallel_size


def chunk_layers(config: SATFormerConfig) -> list[range]:
    """Layer numbers (1-based) of every pipeline chunk, in the order the model runs them.

    Chunk vp_stage * pipeline_model_parallel_size + pp_rank; it may hold no layer at all. Needs no
    process group.
    """
    layout = config.pipeline_model_parallel_layout
    ranks = config.pipeline_model_parallel_size
    virtual = config.virtual_pipeline_model_parallel_size
    counts = [
        # Not through get_num_layers_to_build (0.19.2), which forgets pp_rank where there is one.
        layout.layout[rank][stage or 0].count(LayerType.decoder)
        if layout is not None
        else get_num_layers_to_build(config, stage, rank)
        for stage in (range(virtual) if virtual else [None])
        for rank in range(ranks)
    ]
    return [range(a + 1, b + 1) for a, b in pairwise(accumulate(counts, initial=0))]


def check_ranks_hold_something(config: SATFormerConfig) -> None:
    """Refuse a pipeline rank without any parameter, which Megatron (0.19.2) cannot load.

    Args:
        config: the model; no process group is needed.

    Raises:
        ValueError: a rank between the first and the last holds no layer in any of its chunks.
    """
    ranks = config.pipeline_model_parallel_size
    chunks = chunk_layers(config)
    for rank in range(1, ranks - 1):
        if not any(chunks[rank::ranks]):
            raise ValueError(
                f"pipeline_model_parallel_layout ({config.pipeline_model_parallel_layout}) must "
                f"give every pipeline rank a layer, the embedding or the loss; rank {rank} of "
                f"pipeline_model_parallel_size ({ranks}) holds nothing. Give it a layer (t), or "
                "use fewer ranks."
            )


def boundary_is_packed(config: SATFormerConfig, layers_before: int) -> bool:
    """Whether [hidden | V1] crosses the boundary behind so many layers, or hidden alone.

    Before layer 1 there is no V1, and behind the last layer nobody reads it. Megatron's interleaved
    schedule receives everything in one shape, so there all boundaries are alike: zeros fill the
    place of V1 before layer 1.
    """
    if config.architecture == "transformer":
        return False
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    return interleaved or 0 < layers_before < config.num_layers


def boundary_width(config: SATFormerConfig, layers_before: int) -> int:
    """Last axis of what crosses the boundary behind so many layers."""
    packed = boundary_is_packed(config, layers_before)
    return packed_width(config) if packed else config.hidden_size


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
        hidden_states and v1, as `pack` took them; v1 in the dtype of the parameters again, where
        the residual stream travels in fp32 (--fp32-residual-connection).
    """
    hidden_states, flat = packed.split([config.hidden_size, carried_width(config)], dim=-1)
    groups = config.num_query_groups // config.tensor_model_parallel_size
    v1 = flat.reshape(-1, packed.size(1), groups, config.kv_channels)
    return hidden_states.contiguous(), v1.to(config.params_dtype).contiguous()
