"""Configuration of SATFormer (arXiv 2605.03953) for Hugging Face transformers."""

from typing import ClassVar

from .configuration_decoder import DecoderConfig
from .configuration_value_residual import ValueResidualConfig

VALUE_GATES = ("relu", "sigmoid", "softmax", "softmax_sigmoid", "tanh", "identity")


class SATFormerConfig(ValueResidualConfig):
    """ValueResidualConfig with a gate.

    Attributes:
        value_gate: Function from gate logits to alpha, one of `VALUE_GATES`.
        value_gate_bias: Whether the gate projection has a bias.
    """

    model_type = "satformer"
    base_model_tp_plan: ClassVar[dict[str, str]] = DecoderConfig.base_model_tp_plan | {
        "layers.*.self_attn.value_gate": "colwise"
    }

    architecture: str = "satformer"
    value_gate: str = "relu"
    value_gate_bias: bool = False

    def __post_init__(self, **kwargs):
        if self.value_gate not in VALUE_GATES:
            raise ValueError(f"value_gate ({self.value_gate}) must be one of {VALUE_GATES}.")
        super().__post_init__(**kwargs)


SATFormerConfig.register_for_auto_class()

__all__ = ["SATFormerConfig"]
