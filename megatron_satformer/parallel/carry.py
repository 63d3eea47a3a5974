"""What layers carry, across pipeline stages: pack, unpack, and which boundary is how wide.

Between stages travels one tensor, hidden_states and all that is carried one behind the other, so
Megatron's schedules, recompute and TransformerBlock stay as they are, and every gradient comes
back by plain autograd. The same tensor-parallel rank packs and unpacks. Elements per row:

    h (1 + streams) + heads kv / tp      rows are s
    h (1 + streams) + heads kv           rows are s/tp, under sequence parallelism

A chunk is what one rank runs in one go: a pipeline stage, or one of its virtual stages.

Shapes: s sequence, b micro-batch, h hidden, ng KV heads, hn head dim, kv = ng * hn; "/tp": per
rank.
"""

from itertools import accumulate, pairwise
from math import prod

import torch
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.architectures import find_architecture
from megatron_satformer.model.architectures.record import Carry


def carry_behind(config: DecoderConfig, n: int) -> Carry:
    """What crosses the boundary behind n layers beside hidden_states."""
    return find_architecture(config.architecture).carry_behind(config, n)


def boundary_width(config: DecoderConfig, n: int) -> int:
    """Last axis, on one rank, of what crosses the boundary behind n layers."""
    carry = carry_behind(config, n)
    kv = config.kv_projection_size
    if not config.sequence_parallel:
        kv //= config.tensor_model_parallel_size
    return config.hidden_size * (1 + carry.streams) + kv * carry.heads


def boundary_widths(config: DecoderConfig) -> list[int]:
    """`boundary_width` of every boundary between two chunks, in the order the model runs them."""
    return [boundary_width(config, layers.stop - 1) for layers in chunk_layers(config)[:-1]]


def chunk_layers(config: DecoderConfig) -> list[range]:
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


def check_ranks_hold_something(config: DecoderConfig) -> None:
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


def pack(hidden_states: Tensor, carried: tuple[Tensor, ...]) -> Tensor:
    """One tensor, its parts one behind the other in memory, so that unpacking needs no copies.

    Args:
        hidden_states: [s, b, h], or [s/tp, b, h] under sequence parallelism.
        carried: streams like hidden_states first, then heads [s, b, ng/tp, hn].

    Returns:
        [s, b, width], or [s/tp, b, width] under sequence parallelism, in the dtype of
        hidden_states. Rows of it mean nothing.
    """
    rows, batch, _ = hidden_states.shape
    parts = [part.to(hidden_states.dtype).reshape(-1) for part in (hidden_states, *carried)]
    packed = torch.cat(parts).view(rows, batch, -1)
    # The schedule frees the output after sending it and refuses views.
    return make_viewless_tensor(packed, requires_grad=packed.requires_grad, keep_graph=True)


def unpack(
    packed: Tensor, config: DecoderConfig, carry: Carry
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Inverse of `pack`: contiguous views of the received buffer, which the schedule keeps anyway.

    Args:
        packed: as `pack` returns it.
        config: gives h, hn and the parallel sizes.
        carry: what is in it.

    Returns:
        hidden_states and what was carried, as `pack` took them; heads in the dtype of the
        parameters again, where the residual stream travels in fp32 (--fp32-residual-connection).
    """
    rows, batch, _ = packed.shape
    tp = config.tensor_model_parallel_size
    sequence = rows * tp if config.sequence_parallel else rows
    stream = (rows, batch, config.hidden_size)
    head = (sequence, batch, config.num_query_groups // tp, config.kv_channels)
    shapes = [stream] * (1 + carry.streams) + [head] * carry.heads
    parts = packed.reshape(-1).split([prod(shape) for shape in shapes])
    tensors = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    heads = [tensor.to(config.params_dtype) for tensor in tensors[1 + carry.streams :]]
    return tensors[0], (*tensors[1 : 1 + carry.streams], *heads)
