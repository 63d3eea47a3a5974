"""Configuration of LIMe (arXiv 2502.09245) for Hugging Face transformers."""

from .configuration_decoder import DecoderConfig


class LIMeConfig(DecoderConfig):
    """DecoderConfig of a decoder whose layers read keys and values of all layers so far."""

    model_type = "lime"

    architecture: str = "lime"


LIMeConfig.register_for_auto_class()

__all__ = ["LIMeConfig"]
