"""Receive buffers as wide as what the stages send: every boundary its own width."""

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from torch.distributed import ProcessGroup

from megatron_satformer.config import DecoderConfig
from megatron_satformer.parallel.carry import boundary_width, chunk_layers


class _ShapesAreOurs:
    """The config as P2PCommunicator sees it: shapes come from `_communicate_shapes`."""

    variable_seq_lengths = True

    def __init__(self, config: DecoderConfig) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class CarryP2PCommunicator(P2PCommunicator):
    """P2PCommunicator that knows the width of every boundary of its rank.

    Serves the plain and the interleaved schedule alike; no shape exchange, no extra message.

    Args:
        pp_group: the pipeline's ranks.
        config: the model.
        evaluated: micro-batches of an evaluation. The interleaved schedule runs through its chunks
            in groups of micro-batches, of which the last may be smaller: their number counts.
        one_stream: whether a micro-batch is one sample made of all of its samples: packed documents
            under Transformer Engine. The schedules (0.19.2) do not know.
    """

    def __init__(
        self,
        pp_group: ProcessGroup,
        config: DecoderConfig,
        evaluated: int,
        one_stream: bool = False,
    ) -> None:
        super().__init__(pp_group, config)
        self.one_stream = one_stream
        self.config = _ShapesAreOurs(config)
        self.evaluated = evaluated
        chunks = chunk_layers(config)[pp_group.rank() :: pp_group.size()]
        self.before = [boundary_width(config, chunk.start - 1) for chunk in chunks]
        self.behind = [boundary_width(config, chunk.stop - 1) for chunk in chunks]
        self._widths_before: Iterator[int] = repeat(self.before[0])
        self._widths_behind: Iterator[int] = repeat(self.behind[0])
        self._shape: Any = None

    # P2PCommunicator.recv_forward, 0.19.2: the interleaved schedule calls it once, at its start, on
    # every rank (schedules.py:1518); the plain one, with one chunk a rank, may call it at any time.
    def recv_forward(self, tensor_shapes: Any, is_first_stage: bool) -> Any:
        """As P2PCommunicator's."""
        if len(self.before) > 1:
            self._start_interleaved()
        return super().recv_forward(tensor_shapes, is_first_stage)

    def _start_interleaved(self) -> None:
        """Puts the widths in the order in which this schedule will receive.

        A rank receives in the order in which its neighbour runs: its own order, but for the two
        ends of the pipeline, where the neighbour's chunk is one before, or one behind, its own.
        """
        chunks, group = len(self.before), self.config.microbatch_group_size_per_vp_stage
        count = get_num_microbatches() if torch.is_grad_enabled() else self.evaluated
        table = get_schedule_table(count, chunks, group)
        forward = [chunk for _, chunk in table]
        backward = [chunks - 1 - chunk for chunk in forward]
        if self.is_pp_first_stage:
            forward = [chunk + 1 for chunk in forward if chunk + 1 < chunks]
        if self.is_pp_last_stage:
            backward = [chunk - 1 for chunk in backward if chunk > 0]
        self._widths_before = iter([self.before[chunk] for chunk in forward])
        self._widths_behind = iter([self.behind[chunk] for chunk in backward])

    # P2PCommunicator._communicate, 0.19.2: every schedule's send and receive ends here. It gives
    # both directions one shape, unless it asks _communicate_shapes.
    def _communicate(self, *, tensor_shape: Any, **kwargs: Any) -> Any:
        if self.one_stream and tensor_shape is not None:
            rows, batch, width = tensor_shape
            tensor_shape = (rows * batch, 1, width)
        self._shape = tensor_shape
        return super()._communicate(tensor_shape=tensor_shape, **kwargs)

    # P2PCommunicator._communicate_shapes, 0.19.2, which would send messages to ask.
    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[Any, Any]:
        return (
            (*self._shape[:-1], next(self._widths_before)) if recv_prev else None,
            (*self._shape[:-1], next(self._widths_behind)) if recv_next else None,
        )
