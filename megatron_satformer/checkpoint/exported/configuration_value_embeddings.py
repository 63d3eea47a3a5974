"""Configuration of gated value embeddings for Hugging Face transformers."""

from .configuration_decoder import DecoderConfig


class ValueEmbeddingsConfig(DecoderConfig):
    """DecoderConfig of a decoder whose every other layer reads a table of values at the token."""

    model_type = "megatron_value_embeddings"

    architecture: str = "value_embeddings"


ValueEmbeddingsConfig.register_for_auto_class()

__all__ = ["ValueEmbeddingsConfig"]
