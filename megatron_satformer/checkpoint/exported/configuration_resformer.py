"""Configuration of ResFormer (arXiv 2410.17897) for Hugging Face transformers."""

from .configuration_value_residual import ValueResidualConfig


class ResFormerConfig(ValueResidualConfig):
    """ValueResidualConfig with static weights."""

    model_type = "resformer"

    architecture: str = "resformer"


ResFormerConfig.register_for_auto_class()

__all__ = ["ResFormerConfig"]
