"""Receive buffers as wide as what the stages send."""

from typing import Any

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_satformer.parallel.carry import packed_width


class CarryP2PCommunicator(P2PCommunicator):
    """P2PCommunicator whose tensors are [hidden | V1] instead of hidden.

    Serves the plain and the interleaved schedule alike; no shape exchange, no extra message.
    """

    # P2PCommunicator._communicate, 0.19.2: every schedule's send and receive ends here, and the
    # shape it is given holds for both directions.
    def _communicate(self, *, tensor_shape: Any, **kwargs: Any) -> Any:
        if tensor_shape is not None:
            tensor_shape = (*tensor_shape[:-1], packed_width(self.config))
        return super()._communicate(tensor_shape=tensor_shape, **kwargs)
