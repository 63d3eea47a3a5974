"""What the configurations of SATFormer and ResFormer share."""

from .configuration_decoder import DecoderConfig


class ValueResidualConfig(DecoderConfig):
    """DecoderConfig of a decoder whose layers read the values of the first one.

    Attributes:
        value_residual_last_k: Only the last k layers mix the first layer's values, 1 <= k <= L - 1;
            None means all layers but the first, which never mixes.
    """

    value_residual_last_k: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        last_k = self.value_residual_last_k
        if last_k is not None and not 1 <= last_k < self.num_hidden_layers:
            raise ValueError(
                f"value_residual_last_k ({last_k}) must be at least 1 and less than "
                f"num_hidden_layers ({self.num_hidden_layers})."
            )

    @property
    def mixing_layers(self) -> range:
        """Indices (0-based) of the layers that mix V1 into their values; never the first layer."""
        last_k = self.value_residual_last_k or self.num_hidden_layers - 1
        return range(self.num_hidden_layers - last_k, self.num_hidden_layers)
