"""Configuration of mHC (arXiv 2512.24880) for Hugging Face transformers."""

from .configuration_decoder import DecoderConfig

CHOICES = {"mhc_residual": ("transposed", "plain"), "mhc_collapse": ("mean", "sum", "head")}


class MHCConfig(DecoderConfig):
    """DecoderConfig of a decoder whose residual streams keep their mean.

    Attributes:
        hc_streams: How many.
        mhc_residual: Which side of the doubly stochastic matrix the streams are on. plain: new
            stream i is the sum over its row i; transposed: over its column i.
        mhc_collapse: What the final norm reads of the streams: their mean, their sum, or by a head
            of its own a sum whose weights each token gives.
        mhc_sinkhorn_iterations: Rounds in which rows, then columns, are made to sum to 1.
    """

    model_type = "mhc"

    architecture: str = "mhc"
    hc_streams: int = 4
    mhc_residual: str = "transposed"
    mhc_collapse: str = "mean"
    mhc_sinkhorn_iterations: int = 20

    def __post_init__(self, **kwargs):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} ({getattr(self, name)}) must be one of {choices}.")
        super().__post_init__(**kwargs)


MHCConfig.register_for_auto_class()

__all__ = ["MHCConfig"]
