"""When which chunk runs on a pipeline rank, and so how much is held at once.

Source: megatron/core/pipeline_parallel/schedules.py, 0.19.2. Must not know: models, GPUs.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megatron_satformer.planning.measure import Footprint


class Pass(NamedTuple):
    """One pass of a micro-batch through one of a rank's chunks."""

    chunk: int
    forward: bool


class Held(NamedTuple):
    """The moment when a rank holds most.

    Attributes:
        bytes: of activations, temporary ones included.
        kept: bytes of them that wait: for a backward pass, or to be sent.
        flights: chunk of the rank -> micro-batches in flight.
    """

    bytes: int
    kept: int
    flights: Counter[int]


def passes(stages: int, stage: int, chunks: int, micro_batches: int, group: int) -> Iterator[Pass]:
    """What one pipeline rank runs in one step, in order.

    Args:
        stages: pipeline ranks.
        stage: which of them.
        chunks: that each holds.
        micro_batches: of a step.
        group: micro-batches that one chunk runs before the next does.
    """
    order = [chunk for _, chunk in get_schedule_table(micro_batches, chunks, group)]
    behind = stages - stage - 1
    warmup = min(behind * 2 + (chunks - 1) * group if chunks > 1 else behind, len(order))
    yield from (Pass(chunk, True) for chunk in order[:warmup])
    back = [chunks - 1 - chunk for chunk in order]
    for forward, backward in zip(order[warmup:], back, strict=False):
        yield Pass(forward, True)
        yield Pass(backward, False)
    yield from (Pass(chunk, False) for chunk in back[len(order) - warmup :])


def most_held(order: Iterator[Pass], chunks: Sequence[Footprint]) -> Held:
    """The most that a rank holds while it runs through `order`.

    Args:
        order: from `passes`.
        chunks: what one micro-batch does in each of the rank's chunks.
    """
    received, sent = (max(getattr(c, name) for c in chunks) for name in ("received", "sent"))
    # The gradient that came last is still referenced; where messages overlap with passes, the next
    # two are there and the last two not yet gone.
    underway = 2 * (received + sent) if len(chunks) > 1 else max(received, sent)
    kept, flights, most = underway, Counter[int](), Held(0, 0, Counter())
    for chunk, forward in order:
        one = chunks[chunk]
        if forward:
            flights[chunk] += 1
            at_once = kept + one.forward
            kept += one.kept
        else:
            at_once = kept - one.kept + one.backward
            kept -= one.kept
        if at_once > most.bytes:
            most = Held(at_once, kept if forward else kept + one.kept, flights.copy())
        flights[chunk] -= not forward
    return most
