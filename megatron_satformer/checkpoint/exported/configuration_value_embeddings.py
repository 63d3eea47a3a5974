"""Configuration of gated value embeddings for Hugging Face transformers."""

from .configuration_decoder import DecoderConfig


class ValueEmbeddingsConfig(DecoderConfig):
    """DecoderConfig of a decoder whose every other layer reads a table of values at the token."""

    model_type = "megatron_value_embeddings"

    architecture: str = "value_embeddings"

    @property
    def mixing_layers(self) -> range:
        """Indices (0-based) of the layers that have a table: every other one, and the last."""
        last = self.num_hidden_layers - 1
        return range(last % 2, self.num_hidden_layers, 2)

    @property
    def value_gate(self) -> str:
        """The gate function."""
        return "3 sigmoid"


ValueEmbeddingsConfig.register_for_auto_class()

__all__ = ["ValueEmbeddingsConfig"]
