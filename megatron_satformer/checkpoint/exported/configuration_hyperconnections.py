"""Configuration of Hyper-Connections (arXiv 2409.19606) for Hugging Face transformers."""

from .configuration_decoder import DecoderConfig


class HyperConnectionsConfig(DecoderConfig):
    """DecoderConfig of a decoder with several residual streams.

    Attributes:
        hc_streams: How many.
        hc_dynamic: Whether each token adds to the weights by which they are mixed.
        hc_tanh: Whether tanh bounds what it adds.
    """

    model_type = "hyperconnections"

    architecture: str = "hyperconnections"
    hc_streams: int = 4
    hc_dynamic: bool = True
    hc_tanh: bool = True


HyperConnectionsConfig.register_for_auto_class()

__all__ = ["HyperConnectionsConfig"]
