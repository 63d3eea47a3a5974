"""Configuration of MUDDFormer (arXiv 2502.12170) for Hugging Face transformers."""

from .configuration_decoder import DecoderConfig

MUDD_FORMS = ("paper", "released", "baseline")


class MuddFormerConfig(DecoderConfig):
    """DecoderConfig of a decoder whose layers read four sums of what earlier layers made.

    Attributes:
        mudd_prepost_norm: What is summed up is normed, and every sum, beside the newest output.
        mudd_ffn_realloc: MLPs are 0.5 to 1.5 times intermediate_size wide, in multiples of 128.
        mudd_form: One of `MUDD_FORMS`. released: W1 is wider, as in the models of its authors;
            baseline: norms of q, k and v in the first layer too, and multiples of 256.
    """

    model_type = "megatron_muddformer"

    architecture: str = "muddformer"
    mudd_prepost_norm: bool = False
    mudd_ffn_realloc: bool = False
    mudd_form: str = "paper"

    def __post_init__(self, **kwargs):
        if self.mudd_form not in MUDD_FORMS:
            raise ValueError(f"mudd_form ({self.mudd_form}) must be one of {MUDD_FORMS}.")
        super().__post_init__(**kwargs)


MuddFormerConfig.register_for_auto_class()

__all__ = ["MuddFormerConfig"]
