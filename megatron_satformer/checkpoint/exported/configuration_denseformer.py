"""Configuration of DenseFormer (arXiv 2402.02622) for Hugging Face transformers."""

from .configuration_decoder import DecoderConfig


class DenseFormerConfig(DecoderConfig):
    """DecoderConfig of a decoder whose layers read sums of what earlier layers made.

    Attributes:
        dwa_dilation: A sum has every how many layers' outputs.
        dwa_period: Behind every how many layers there is one.
    """

    model_type = "megatron_denseformer"

    architecture: str = "denseformer"
    dwa_dilation: int = 1
    dwa_period: int = 1


DenseFormerConfig.register_for_auto_class()

__all__ = ["DenseFormerConfig"]
