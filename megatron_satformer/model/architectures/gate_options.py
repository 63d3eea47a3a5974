"""SATFormer's gates: which there are, their options, and what they add to a checkpoint.

Must not know: modules, tensor-parallel ranks.

Shapes: h hidden, ng KV heads, hn head dim, kv = ng hn, r rank of a low-rank map.
"""

from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

from megatron_satformer.model.architectures.record import OwnTensor
from megatron_satformer.model.architectures.value_residual import (
    ValueResidualConfig,
    ValueResidualOptions,
    mixes,
)

PUBLISHED = ("relu", "sigmoid", "softmax", "softmax_sigmoid", "tanh", "identity")
ALIVE = ("softplus", "leaky_relu")  # with a gradient everywhere
CONVEX = LERP, CHANNELS = "lerp", "lerp_channels"
CONSTANT = "constant"
VALUE_GATES = (*PUBLISHED, *ALIVE, *CONVEX, CONSTANT)
OWN_BIAS = (CONSTANT, CHANNELS)  # they have a bias in any case, or are one
STARTS_SHUT = ("tanh", "identity", CONSTANT)  # 0 at 0, with a gradient there
# What is asked of a gate, each against the usual one: to start shut, to start open, to leave V_1 a
# share of its own, to have another function, or no input at all.
CONTROLS: dict[str, dict[str, Any]] = {
    "satformer-zero": {"value_gate": "tanh", "value_gate_init_std": 0.0},
    "satformer-open": {"value_gate_bias": True, "value_gate_bias_init": 1.0},
    "satformer-offset": {"value_gate_offset": 1.0},
    **{f"satformer-{gate}": {"value_gate": gate} for gate in VALUE_GATES[1:]},
}


@dataclass
class SATFormerOptions(ValueResidualOptions):
    """SATFormer's own options."""

    value_gate: Literal[
        "relu",
        "sigmoid",
        "softmax",
        "softmax_sigmoid",
        "tanh",
        "identity",
        "softplus",
        "leaky_relu",
        "lerp",
        "lerp_channels",
        "constant",
    ] = "relu"
    """Gate function of satformer. The softmax forms run over all KV heads of the model and are
    scaled by their number. softplus and leaky_relu (slope 0.01 below 0) cannot die. lerp: convex,
    (1 - a) V + a V_1, a = sigmoid; lerp_channels: the same per channel, by a low-rank map and a
    bias, as RWKV-7. constant: a learned scalar per layer and KV head, without input."""

    value_gate_bias: bool = False
    """Give the gate projection a bias."""

    value_gate_offset: float = 0.0
    """Added to what the gate function gives: with 1 V_1's share is 1 + gate, and cannot die."""

    value_gate_rank: int | None = None
    """Rank of lerp_channels' map. Default: RWKV-7's, 1.3 sqrt(h) in multiples of 32, at least
    32."""

    value_gate_bias_init: float = field(default=0.0, metadata={"changeable": True})
    """Where the gate's biases start, and the scalars of constant: above 0 relu gates start open."""

    value_gate_init_std: float | None = field(default=None, metadata={"changeable": True})
    """Standard deviation of the gate projection at init. Default: that of the other weights
    (--init-method-std). 0 starts as a plain Transformer with tanh and identity; relu gates would
    never open, having no gradient at 0, and the others start open."""

    log_gates_interval: int | None = field(default=None, metadata={"changeable": True})
    """Steps between two lines of mean alpha and share of zeros per mixing layer in metrics.jsonl
    and TensorBoard. Default: none."""


@dataclass
class SATFormerConfig(ValueResidualConfig, SATFormerOptions):
    """ValueResidualConfig with gates."""

    architecture: str = "satformer"

    @classmethod
    def check_options(cls, options: Any, *, num_layers: int, groups: int, tp: int) -> None:
        """As ValueResidualConfig's; an interval is some steps, and every option reaches a gate."""
        super().check_options(options, num_layers=num_layers, groups=groups, tp=tp)
        if options.log_gates_interval is not None and options.log_gates_interval < 1:
            raise ValueError(
                f"log_gates_interval ({options.log_gates_interval}) must be at least 1 step. Leave "
                "it out to log no gates."
            )
        _check_gate(options)
        if options.value_gate == CHANNELS and gate_rank(options) % tp:
            raise ValueError(
                f"value_gate_rank ({gate_rank(options)}) must be a multiple of "
                f"tensor_model_parallel_size ({tp}): its rows are sharded. Use another rank."
            )

    @property
    def summary(self) -> str:
        """As DecoderConfig's."""
        bias = " with bias" if self.value_gate_bias else ""
        offset = f"{self.value_gate_offset:g} + " if self.value_gate_offset else ""
        return f"{super().summary}, {offset}{self.value_gate} gate{bias}"

    @property
    def warning(self) -> str | None:
        """What is wrong with gates whose projection starts at exactly 0."""
        why = why_not_from_zero(self)
        if self.value_gate_init_std != 0 or why is None or self.value_gate_bias_init:
            return None
        way = ""
        if self.value_gate == "relu":
            way = (
                " Use --value-gate tanh or identity, which start at 0 and learn, or a small "
                "--value-gate-init-std (1e-3)."
            )
        return f"value_gate ({self.value_gate}) with value_gate_init_std (0): {why}{way}"


def _check_gate(options: Any) -> None:
    """Refuse options that the gate does not have."""
    gate, offset, rank = options.value_gate, options.value_gate_offset, options.value_gate_rank
    start = options.value_gate_bias_init
    for name, value in (("value_gate_offset", offset), ("value_gate_bias_init", start)):
        if not isfinite(value):
            raise ValueError(f"{name} ({value}) must be finite. Leave it out for 0.")
    beside = f"must not be given with value_gate ({gate})"
    if options.value_gate_bias and gate in OWN_BIAS:
        raise ValueError(
            f"value_gate_bias (True) {beside}, which has its own. Leave it out; where that starts "
            "says --value-gate-bias-init."
        )
    if start and not (options.value_gate_bias or gate in OWN_BIAS):
        raise ValueError(
            f"value_gate_bias_init ({start}) must come with --value-gate-bias. Add it, or leave "
            "both out."
        )
    if offset and gate in (*CONVEX, CONSTANT):
        why = "that is an offset itself" if gate == CONSTANT else "whose shares add up to 1"
        raise ValueError(f"value_gate_offset ({offset}) {beside}, {why}. Leave it out.")
    if options.value_gate_init_std is not None and gate == CONSTANT:
        raise ValueError(
            f"value_gate_init_std ({options.value_gate_init_std}) {beside}, which projects "
            "nothing. Use --value-gate-bias-init."
        )
    if rank is not None and (gate != CHANNELS or rank < 1):
        raise ValueError(
            f"value_gate_rank ({rank}) must be at least 1, and come with value_gate ({CHANNELS}), "
            f"not value_gate ({gate}). Leave it out."
        )


def why_not_from_zero(options: Any) -> str | None:
    """Why gates whose projection is 0 do not start as a Transformer and learn; None: they do."""
    gate, offset = options.value_gate, options.value_gate_offset
    if offset:
        return f"value_gate_offset ({offset}) opens every gate."
    if gate in STARTS_SHUT:
        return None
    if gate == "relu":
        return "relu has no gradient at 0 and would never open."
    if gate == "leaky_relu":
        return "leaky_relu has a hundredth of its gradient at 0."
    return f"{gate} starts open. Only {', '.join(STARTS_SHUT)} start at 0 and learn."


def why_not_published(options: Any) -> str | None:
    """What of these gates the paper's repository does not have."""
    if options.value_gate not in PUBLISHED:
        return f"value_gate ({options.value_gate}) must be one of {', '.join(PUBLISHED)}"
    if options.value_gate_offset:
        return f"value_gate_offset ({options.value_gate_offset}) must be 0"
    return None


def is_convex(options: Any) -> bool:
    """Whether V loses the share that V_1 gets."""
    return options.value_gate in CONVEX


def gate_rank(options: Any) -> int:
    """Rank of the map of lerp_channels."""
    return options.value_gate_rank or max(32, round(1.3 * options.hidden_size**0.5 / 32) * 32)


def gate_rows(options: Any) -> int:
    """Rows of the gate projection, all of the model's: ng, r, or none."""
    if options.value_gate == CONSTANT:
        return 0
    return gate_rank(options) if options.value_gate == CHANNELS else options.num_query_groups


def own_tensors(options: Any, n: int) -> list[OwnTensor]:
    """What the gate of layer n has."""
    if not mixes(options, n):
        return []
    at, theirs, heads = (
        "self_attention.value_gate",
        "self_attn.value_gate",
        options.num_query_groups,
    )
    if options.value_gate == CONSTANT:
        return [OwnTensor(f"{at}.alpha", ("self_attn.value_alpha",), (heads,), fp32=True)]
    shape = (gate_rows(options), options.hidden_size)
    if options.value_gate == CHANNELS:
        kv = heads * options.kv_channels
        return [
            OwnTensor(f"{at}.weight", (f"{theirs}_down.weight",), shape),
            OwnTensor(f"{at}_up.weight", (f"{theirs}_up.weight",), (kv, shape[0])),
            OwnTensor(f"{at}_up.bias", (f"{theirs}_up.bias",), (kv,)),
        ]
    weight = OwnTensor(f"{at}.weight", (f"{theirs}.weight",), shape)
    bias = OwnTensor(f"{at}.bias", (f"{theirs}.bias",), (heads,))
    return [weight, bias] if options.value_gate_bias else [weight]
