"""Configuration of Hyper-Connections (arXiv 2409.19606) for Hugging Face transformers."""

from .configuration_decoder import DecoderConfig

HC_FORMS = ("paper", "baseline")


class HyperConnectionsConfig(DecoderConfig):
    """DecoderConfig of a decoder with several residual streams.

    Attributes:
        hc_streams: How many.
        hc_dynamic: Whether each token adds to the weights by which they are mixed.
        hc_tanh: Whether tanh bounds what it adds.
        hc_form: One of `HC_FORMS`, of the norm of streams for what it adds. paper: without gain;
            baseline: with a gain, and float32's epsilon whatever rms_norm_eps is.
    """

    model_type = "hyperconnections"

    architecture: str = "hyperconnections"
    hc_streams: int = 4
    hc_dynamic: bool = True
    hc_tanh: bool = True
    hc_form: str = "paper"

    def __post_init__(self, **kwargs):
        if self.hc_form not in HC_FORMS:
            raise ValueError(f"hc_form ({self.hc_form}) must be one of {HC_FORMS}.")
        super().__post_init__(**kwargs)


HyperConnectionsConfig.register_for_auto_class()

__all__ = ["HyperConnectionsConfig"]
