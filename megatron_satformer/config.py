"""What a model of this project is: Megatron's TransformerConfig plus the value residual.

One source of truth per number: a field here is a flag of the same name on the command line
(``arguments.py``), an attribute of the checkpoint's args, and a key of the exported config.json.
Must not know: modules, process groups, training.
"""

from dataclasses import dataclass, field
from typing import Literal

from megatron.core.transformer import TransformerConfig
from megatron.core.utils import init_method_normal

ARCHITECTURES = ("transformer", "resformer", "satformer")
VALUE_GATES = ("relu", "sigmoid", "softmax", "softmax_sigmoid", "tanh", "identity")


@dataclass
class ValueResidualOptions:
    """Cross-layer value access: SATFormer (arXiv 2605.03953) and the systems it is compared to."""

    architecture: Literal["transformer", "resformer", "satformer"] = "satformer"
    """transformer: plain GPT. resformer: V' = lambda1 V1 + lambda2 V, one pair per layer (arXiv
    2410.17897). satformer: V' = V + gate(W x) V1, one gate per token and KV head."""

    value_gate: Literal["relu", "sigmoid", "softmax", "softmax_sigmoid", "tanh", "identity"] = (
        "relu"
    )
    """Gate function of satformer. The softmax forms run over all KV heads of the model and are
    scaled by their number."""

    value_gate_bias: bool = False
    """Give the gate projection a bias (initialised to 0)."""

    value_gate_init_std: float | None = None
    """Standard deviation of the gate projection at init. Default: that of the other weights
    (--init-method-std). 0 starts as a plain Transformer with tanh and identity; relu gates would
    never open, having no gradient at 0, and the others start open."""

    value_residual_last_k: int | None = None
    """Mix V1 into the last k layers only, 1 <= k <= num_layers - 1. Default: into all but the
    first."""

    scaled_output_init: bool = False
    """Scale the init of the output projections (linear_proj, linear_fc2) by 1/sqrt(2 num_layers),
    Megatron's default. Without it they are N(0, init_method_std) like the rest, as published."""

    from_transformer: bool = False
    """Start a satformer from the weights of a plain Transformer, saved by this project or by
    Megatron-LM: its folder is --pretrained-checkpoint (read until --load holds a checkpoint, so
    that the same command line resumes), or --load with --finetune. The gates keep their own init;
    optimizer, schedule and data start afresh."""


@dataclass
class SATFormerConfig(TransformerConfig, ValueResidualOptions):
    """Megatron's TransformerConfig with the value residual's options.

    Raises:
        ValueError: an option is out of its range (the message names option, value and way out).
        NotImplementedError: fused_single_qkv_rope, which has no flag.
    """

    expects_transformer: bool = field(default=False, init=False)  # see expect_transformer

    def __post_init__(self) -> None:
        if self.architecture != "transformer":
            # Layers differ in shape (layer 1 has no gate): one checkpoint entry per layer. The
            # spelling is Megatron's.
            self.hetereogenous_dist_checkpoint = True
        if self.architecture == "resformer":
            # The lambdas are shared by all stages: Megatron sums the gradients of parameters
            # marked `pipeline_parallel` over stages when the config has this attribute.
            self.has_cond_embedder = True
        given = getattr(self, "output_layer_init_method", None)
        if given is None and not self.scaled_output_init:
            self.output_layer_init_method = init_method_normal(self.init_method_std)
        if self.fused_single_qkv_rope:
            raise NotImplementedError(
                "fused_single_qkv_rope (True) is not supported: it never splits V off, which the "
                "value residual is added to. Leave it out."
            )
        check_value_residual(
            architecture=self.architecture,
            num_layers=self.num_layers,
            last_k=self.value_residual_last_k,
            groups=self.num_query_groups or self.num_attention_heads,
            tp=self.tensor_model_parallel_size,
        )
        super().__post_init__()

    def expect_transformer(self, expected: bool) -> None:
        """Give checkpoint entries the form of a plain Transformer, or of this model.

        Args:
            expected: whether the next checkpoint to be read is a Transformer's, which has no gates
                and holds all layers of a kind in one tensor.
        """
        self.expects_transformer = expected
        self.hetereogenous_dist_checkpoint = not expected

    def mixes(self, layer_number: int) -> bool:
        """Whether layer `layer_number` (1-based) mixes V1 into its values."""
        if self.architecture == "transformer":
            return False
        last_k = self.value_residual_last_k or self.num_layers - 1
        return layer_number > max(1, self.num_layers - last_k)

    @property
    def gate_warning(self) -> str | None:
        """What is wrong with gates whose projection starts at exactly 0."""
        if self.architecture != "satformer" or self.value_gate_init_std != 0:
            return None
        starts = f"value_gate ({self.value_gate}) with value_gate_init_std (0)"
        if self.value_gate == "relu":
            return (
                f"{starts} never opens: relu has no gradient at 0. Use --value-gate tanh or "
                "identity, which start at 0 and learn, or a small --value-gate-init-std (1e-3)."
            )
        if self.value_gate not in ("tanh", "identity"):
            return f"{starts} starts open. Only tanh and identity start at 0 and learn."
        return None

    @property
    def num_mixing_layers(self) -> int:
        """Number of layers that mix V1 in."""
        return sum(self.mixes(n) for n in range(1, self.num_layers + 1))

    @property
    def kv_projection_size(self) -> int:
        """Width of V over the whole model: KV heads times head dim."""
        return self.num_query_groups * self.kv_channels


def check_value_residual(
    *, architecture: str, num_layers: int, last_k: int | None, groups: int, tp: int
) -> None:
    """Refuse shapes that the value residual cannot have.

    Args:
        architecture: one of ARCHITECTURES.
        num_layers: layers of the model.
        last_k: value_residual_last_k.
        groups: KV heads of the model.
        tp: tensor-parallel size.

    Raises:
        ValueError: naming the option, its value and the way out.
    """
    if last_k is not None and not 1 <= last_k < num_layers:
        raise ValueError(
            f"value_residual_last_k ({last_k}) must be at least 1 and less than num_layers "
            f"({num_layers}). Leave it out to mix into every layer but the first."
        )
    if architecture == "transformer":
        return
    if num_layers < 2:
        raise ValueError(
            f"num_layers ({num_layers}) must be at least 2 for architecture ({architecture}): "
            "layer 1 makes V1 and later layers mix it in."
        )
    if groups % tp:
        sizes = [str(n) for n in range(1, groups + 1) if groups % n == 0]
        raise ValueError(
            f"num_query_groups ({groups}) must be a multiple of tensor_model_parallel_size "
            f"({tp}): V1 is sharded by KV head. Use TP {' or '.join(sizes)}."
        )
