"""Receive buffers as wide as what the stages send."""

from typing import Any

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch.distributed import ProcessGroup

from megatron_satformer.config import SATFormerConfig
from megatron_satformer.parallel.carry import boundary_width, chunk_layers


class CarryP2PCommunicator(P2PCommunicator):
    """P2PCommunicator whose tensors are [hidden | V1] wherever V1 has to cross.

    Serves the plain and the interleaved schedule alike; no shape exchange, no extra message.
    """

    def __init__(self, pp_group: ProcessGroup, config: SATFormerConfig) -> None:
        super().__init__(pp_group, config)
        # In the interleaved schedule a rank has several chunks, and one width serves them all.
        layers = chunk_layers(config)[pp_group.rank()]
        self.width_before = boundary_width(config, layers.start - 1)
        self.width_behind = boundary_width(config, layers.stop - 1)

    # P2PCommunicator._communicate, 0.19.2: every schedule's send and receive ends here. It gives
    # both directions one shape; only the interleaved schedule receives from both sides at once.
    def _communicate(self, *, tensor_shape: Any, **kwargs: Any) -> Any:
        if tensor_shape is not None:
            width = self.width_behind if kwargs["recv_next"] else self.width_before
            tensor_shape = (*tensor_shape[:-1], width)
        return super()._communicate(tensor_shape=tensor_shape, **kwargs)
