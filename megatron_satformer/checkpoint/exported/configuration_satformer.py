"""Configuration of SATFormer (arXiv 2605.03953) for Hugging Face transformers."""

from typing import ClassVar

from .configuration_decoder import DecoderConfig
from .configuration_value_residual import ValueResidualConfig

VALUE_GATES = (
    *("relu", "sigmoid", "softmax", "softmax_sigmoid", "tanh", "identity"),
    *("softplus", "leaky_relu", "lerp", "lerp_channels", "constant"),
)


class SATFormerConfig(ValueResidualConfig):
    """ValueResidualConfig with a gate.

    Attributes:
        value_gate: Function from gate logits to alpha, one of `VALUE_GATES`. lerp, lerp_channels:
            a sigmoid, per head or per channel by a low-rank map, by whose share V loses. constant:
            a scalar per KV head, without logits.
        value_gate_bias: Whether the gate projection has a bias.
        value_gate_offset: Added to what the function gives.
        value_gate_rank: Of lerp_channels; None means 1.3 sqrt(hidden_size) in multiples of 32, at
            least 32.
    """

    model_type = "satformer"
    base_model_tp_plan: ClassVar[dict[str, str]] = DecoderConfig.base_model_tp_plan | {
        "layers.*.self_attn.value_gate": "colwise",
    }

    architecture: str = "satformer"
    value_gate: str = "relu"
    value_gate_bias: bool = False
    value_gate_offset: float = 0.0
    value_gate_rank: int | None = None

    def __post_init__(self, **kwargs):
        if self.value_gate not in VALUE_GATES:
            raise ValueError(f"value_gate ({self.value_gate}) must be one of {VALUE_GATES}.")
        if self.value_gate == "lerp_channels":
            # without the rule of value_gate, which vLLM reads as a prefix: of value_gate_down too
            up = {"layers.*.self_attn.value_gate_up": "colwise"}
            self.base_model_tp_plan = DecoderConfig.base_model_tp_plan | up  # type: ignore[misc]
        super().__post_init__(**kwargs)

    @property
    def is_convex(self) -> bool:
        """Whether V loses the share that V_1 gets."""
        return self.value_gate in ("lerp", "lerp_channels")

    @property
    def gate_rank(self) -> int:
        """The rank of lerp_channels, the default worked out."""
        return self.value_gate_rank or max(32, round(1.3 * self.hidden_size**0.5 / 32) * 32)

    @property
    def gate_equation(self) -> str:
        """What alpha is, in a line."""
        per, share = "one scalar per token and KV head", ""
        gate = "sigmoid" if self.is_convex else self.value_gate
        logits = "W_gate,n x_n" + (" + b_n" if self.value_gate_bias else "")
        if self.value_gate == "constant":
            return "alpha_n one learned scalar per KV head"
        if self.value_gate == "lerp_channels":
            per, logits = "per channel", "W_up,n W_down,n x_n + b_n"
        if self.is_convex:
            share = "; V_n has the share 1 - alpha_n"
        offset = f"{self.value_gate_offset:g} + " if self.value_gate_offset else ""
        return f"alpha_n = {offset}{gate}({logits}), {per}{share}"


SATFormerConfig.register_for_auto_class()

__all__ = ["SATFormerConfig"]
