"""Configuration of MUDDFormer (arXiv 2502.12170) for Hugging Face transformers."""

from .configuration_decoder import DecoderConfig


class MuddFormerConfig(DecoderConfig):
    """DecoderConfig of a decoder whose layers read four sums of what earlier layers made.

    Attributes:
        mudd_prepost_norm: What is summed up is normed, and every sum, beside the newest output.
        mudd_ffn_realloc: MLPs are 0.5 to 1.5 times intermediate_size wide, in multiples of 128.
    """

    model_type = "megatron_muddformer"

    architecture: str = "muddformer"
    mudd_prepost_norm: bool = False
    mudd_ffn_realloc: bool = False


MuddFormerConfig.register_for_auto_class()

__all__ = ["MuddFormerConfig"]
