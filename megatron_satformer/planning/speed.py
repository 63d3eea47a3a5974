"""From FLOPs and bytes to seconds: an estimate, from assumptions that it names.

Must not know: models, arguments.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_satformer.planning.hardware import GPU
from megatron_satformer.planning.measure import Footprint, Message

# Of the whole tensor of n bytes over p ranks, what each sends: (p - 1) / p n, twice to reduce.
TWICE = ("allreduce_", "allreduce_coalesced_")


@dataclass(frozen=True)
class Layout:
    """What a speed depends on beside the chunks.

    Attributes:
        chunks: that each pipeline rank holds.
        micro_batches: of a step.
        tensor_parallel, context_parallel, data_parallel: ranks of each.
        gradient_bytes: that data-parallel ranks have to add up, of the rank with most.
        overlapped: whether that happens while the rest computes.
    """

    chunks: int
    micro_batches: int
    tensor_parallel: int
    context_parallel: int
    data_parallel: int
    gradient_bytes: int
    overlapped: bool


@dataclass(frozen=True)
class Speed:
    """Seconds of one step.

    Attributes:
        step: all of it.
        compute: of a mean rank.
        messages: of it, between tensor- and context-parallel ranks and between stages.
        reduction: of gradients, where nothing hides it.
        bubble: share of the passes in which a mean rank waits for others.
    """

    step: float
    compute: float
    messages: float
    reduction: float
    bubble: float


def estimate(
    stages: Sequence[Sequence[Footprint]], layout: Layout, gpu: GPU, flops: float
) -> Speed:
    """Seconds of a step.

    Args:
        stages: of every pipeline rank, its chunks.
        layout: of the run.
        gpu: that each rank has.
        flops: FLOP per second, with what each rank computes.
    """
    computing = [sum(_flops(chunk) for chunk in chunks) / flops for chunks in stages]
    sending = [sum(_sending(chunk, layout, gpu) for chunk in chunks) for chunks in stages]
    each = [a + b for a, b in zip(computing, sending, strict=True)]
    slowest = max(each)
    passes = layout.micro_batches * slowest + (sum(each) - slowest) / layout.chunks
    mean = layout.micro_batches * sum(each) / len(each)
    side, replicas = layout.tensor_parallel, layout.data_parallel * layout.context_parallel
    reduction = 0.0
    if replicas > 1 and not layout.overlapped:
        share = 2 * (replicas - 1) / replicas
        reduction = share * layout.gradient_bytes / gpu.bandwidth(side * replicas)
    return Speed(
        passes + reduction,
        layout.micro_batches * sum(computing) / len(each),
        layout.micro_batches * sum(sending) / len(each),
        reduction,
        1 - mean / passes,
    )


def _flops(chunk: Footprint) -> int:
    return chunk.forward_flops + chunk.backward_flops


def _sending(chunk: Footprint, layout: Layout, gpu: GPU) -> float:
    side = layout.tensor_parallel * layout.context_parallel
    within = sum(n * sent_bytes(message) for message, n in chunk.messages.items())
    stage = gpu.bandwidth(side * layout.data_parallel * 2)  # the next is behind all of these
    return within / gpu.bandwidth(side) + 2 * chunk.sent / stage


def sent_bytes(message: Message) -> float:
    """What each rank of a ring sends."""
    passes = 2 if message.kind in TWICE else 1
    return passes * (message.ranks - 1) / message.ranks * message.bytes
