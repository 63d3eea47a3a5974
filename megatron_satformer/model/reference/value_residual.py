"""Which layers read the values of layer 1: what SATFormer's and ResFormer's twins share."""

from dataclasses import dataclass

from megatron_satformer.model.reference.decoder import TwinConfig


@dataclass
class ValueResidualTwinConfig(TwinConfig):
    """TwinConfig of a decoder whose layers read V1."""

    value_residual_last_k: int | None = (
        None  # None: layers 2..L mix; k: the last k, 1 <= k <= L - 1
    )

    @property
    def mixing_layers(self) -> range:
        """Indices (0-based) of the layers that mix V1 into their values; never the first layer."""
        last_k = self.value_residual_last_k or self.num_hidden_layers - 1
        return range(max(1, self.num_hidden_layers - last_k), self.num_hidden_layers)
