"""Configuration of Depth-Attention (arXiv 2606.05014) for Hugging Face transformers."""

from .configuration_decoder import DecoderConfig


class DepthAttentionConfig(DecoderConfig):
    """DecoderConfig of a decoder whose layers read values of earlier ones by their keys.

    Attributes:
        depth_attention_stride: Later layers read the first layer and every how many-th one from
            there; None means half of num_hidden_layers.
    """

    model_type = "megatron_depth_attention"

    architecture: str = "depth_attention"
    depth_attention_stride: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        stride = self.depth_attention_stride
        if stride is not None and not 1 <= stride < self.num_hidden_layers:
            raise ValueError(
                f"depth_attention_stride ({stride}) must be at least 1 and less than "
                f"num_hidden_layers ({self.num_hidden_layers})."
            )

    @property
    def source_stride(self) -> int:
        """The stride, the default worked out."""
        return self.depth_attention_stride or self.num_hidden_layers // 2


DepthAttentionConfig.register_for_auto_class()

__all__ = ["DepthAttentionConfig"]
