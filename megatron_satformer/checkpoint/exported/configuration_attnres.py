"""Configuration of Attention Residuals (arXiv 2603.15031) for Hugging Face transformers."""

from .configuration_decoder import DecoderConfig

FORMS = ("block", "full")


class AttnResConfig(DecoderConfig):
    """DecoderConfig of a decoder whose sublayers attend over what earlier ones made.

    Attributes:
        attnres_form: One of `FORMS`, what a source is. block: the sum of what the sublayers of
            some layers computed; full: what one sublayer computed.
        attnres_block_layers: How many layers, in the block form; None: an eighth of all.
    """

    model_type = "attnres"

    architecture: str = "attnres"
    attnres_form: str = "block"
    attnres_block_layers: int | None = None

    def __post_init__(self, **kwargs):
        if self.attnres_form not in FORMS:
            raise ValueError(f"attnres_form ({self.attnres_form}) must be one of {FORMS}.")
        super().__post_init__(**kwargs)


AttnResConfig.register_for_auto_class()

__all__ = ["AttnResConfig"]
