"""Hyper-Connections: several residual streams, mixed at every sublayer (arXiv 2409.19606).

    h_0 = A_m^T H,  H' = A_r^T H + B^T T(h_0),  T attention or MLP with its own norm

H are hc_streams streams, copies of the embedding at the start; the final norm reads their sum. Of
every sublayer, from row H_j of H:

    B_j, A_mj, A_rj = B0_j + s_b phi(N(H_j) W_b),  A0_j + s_a phi(N(H_j) W_a)

phi is tanh, N an RMSNorm without gain, or with one in the baseline form. At the start B0 = 1,
A_m0 = e_(q mod hc_streams) in sublayer q = 0, 1, ..., A_r0 = I and W = 0: all streams are then a
Transformer's residual, and the final norm takes their number out of the sum.

Kept for backward beside a Transformer's, per sublayer: the streams but one, h_0 and T(h_0); in
units of s b h, 2 (hc_streams + 1) a layer.

Shapes: s sequence, b micro-batch, h hidden, n streams; "/tp": per rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.utils import init_method_normal, scaled_init_method_normal
from torch import Tensor

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.architectures import find_architecture
from megatron_satformer.model.architectures.extended import REFUSES, Coefficients, ExtendedLayer
from megatron_satformer.model.architectures.layouts import PaperLayout
from megatron_satformer.model.architectures.record import Architecture, Carry, OwnTensor
from megatron_satformer.model.mixing import mix, normed_products
from megatron_satformer.unsupported import Row

SCALE_INIT = 0.01
BASELINE_EPS = torch.finfo(torch.float32).eps


@dataclass
class StreamOptions:
    """Options of the architectures that have several residual streams."""

    hc_streams: int = 4
    """Residual streams (hyperconnections, mhc)."""


@dataclass
class HyperConnectionsOptions(StreamOptions):
    """Hyper-Connections' own options."""

    hc_dynamic: bool = True
    """Let each token add to the learned weights of streams what its streams give
    (hyperconnections)."""

    hc_tanh: bool = True
    """Bound what a token adds by tanh, as published (hyperconnections)."""

    hc_form: Literal["paper", "baseline"] = "paper"
    """How streams are normed for what a token adds (hyperconnections). paper: without gain;
    baseline: with a gain, and float32's epsilon whatever --norm-epsilon says, as in the repository
    of arXiv 2605.03953."""

    hc_rescale_output: bool = field(default=False, metadata={"changeable": True})
    """Divide the init of the output projections (linear_proj, linear_fc2) by sqrt(hc_streams), as
    the paper does (hyperconnections). Without it training starts as the Transformer whose weights
    it has."""


@dataclass
class HyperConnectionsConfig(DecoderConfig, HyperConnectionsOptions):
    """DecoderConfig with several residual streams."""

    architecture: str = "hyperconnections"

    def __post_init__(self) -> None:
        if self.hc_rescale_output and self.output_layer_init_method is None:
            std = self.init_method_std / self.hc_streams**0.5
            self.output_layer_init_method = (
                scaled_init_method_normal(std, self.num_layers)
                if self.scaled_output_init
                else init_method_normal(std)
            )
        super().__post_init__()

    @classmethod
    def check_options(cls, options: Any, *, num_layers: int, groups: int, tp: int) -> None:
        """Refuse no streams, and options without effect."""
        refuse_no_streams(options)
        if not (options.hc_tanh or options.hc_dynamic):
            raise ValueError(
                "hc_tanh (False) must come with hc_dynamic (True), not (False): weights that are "
                "the same for every token have no tanh. Leave --no-hc-tanh out."
            )
        if options.hc_form != "paper" and not options.hc_dynamic:
            raise ValueError(
                f"hc_form ({options.hc_form}) must come with hc_dynamic (True), not (False): "
                "weights that are the same for every token need no norm. Leave --hc-form out."
            )
        if options.hc_rescale_output and options.from_transformer:
            raise ValueError(
                "hc_rescale_output (True) must be left out with from_transformer (True): the "
                "projections are read, not drawn."
            )

    @property
    def summary(self) -> str:
        """As DecoderConfig's."""
        kind = "dynamic" if self.hc_dynamic else "static"
        form = "" if self.hc_form == "paper" else f", {self.hc_form} form"
        return f"{self.architecture}, {self.hc_streams} streams, {kind}{form}"


def refuse_no_streams(options: Any) -> None:
    """Refuse fewer than one residual stream."""
    if options.hc_streams < 1:
        raise ValueError(
            f"hc_streams ({options.hc_streams}) must be at least 1. Leave it out for 4."
        )


def starting_alpha(q: int, streams: int) -> Tensor:
    """A_m, A_r of sublayer q at the start, [n, 1 + n]."""
    identity = torch.eye(streams)
    return torch.cat((identity[:, q % streams, None], identity), dim=1)


class HyperConnection(Coefficients):
    """How one sublayer reads the streams, and how it writes to them; see `_connection`."""

    def forward(self, streams: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Streams [s, b, h] ([s/tp, b, h] under sequence parallelism) -> weights for `mix`.

        Returns:
            A_m [..., 1, n] over the streams; B and A_r [..., n, 1 + n] over T(h_0) and the
            streams. "..." is [s, b], or nothing where every token has the same.
        """
        n = self.config.hc_streams
        beta, alpha = self.static_beta.unsqueeze(-1), self.static_alpha.view(n, 1 + n)
        if self.config.hc_dynamic:
            weight = torch.cat((self.dynamic_beta_proj, self.dynamic_alpha_proj), dim=1)
            eps = self.config.layernorm_epsilon
            if self.config.hc_form == "baseline":
                wide = torch.promote_types(weight.dtype, torch.float32)
                weight = self.norm_gain.to(wide).unsqueeze(-1) * weight
                eps = BASELINE_EPS
            own = normed_products(streams, weight, eps, fused=self.config.fused_blend)
            own = own.tanh() if self.config.hc_tanh else own  # [s, b, n, 1 + 1 + n]
            beta = beta + self.dynamic_beta_scale * own[..., :1]
            alpha = alpha + self.dynamic_alpha_scale * own[..., 1:]
        read, kept = alpha.transpose(-1, -2).split([1, n], dim=-2)
        return read, torch.cat((beta, kept), dim=-1)


class HyperConnectionsLayer(ExtendedLayer):
    """ExtendedLayer of streams: hidden_states is the first, `context` the others."""

    config: Any
    connection: ClassVar[type[Coefficients]] = HyperConnection

    def __init__(self, config: DecoderConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        tensors = find_architecture(config.architecture).tensors(config, self.layer_number)
        for name in ("self_attention_hyper_connection", "mlp_hyper_connection"):
            own = [t for t in tensors if t.megatron.startswith(name)]
            self.add_module(name, self.connection(config, own, self.tp_group))

    def collapse(self, update: Tensor, sources: tuple[Tensor, ...]) -> Tensor:
        """What the final norm reads, [s, b, h]: here the sum of what would be the streams.

        Args:
            update: weights of the streams behind the last sublayer over `sources`.
            sources: what it computed, and the streams before it.
        """
        summed = update.sum(-2, keepdim=True)
        return mix(summed, sources, fused=self.config.fused_blend)[0]

    # TransformerLayer.forward, 0.19.2: what its two halves read is no residual stream, and what
    # they return is not added to one (see without_residual).
    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        context: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Streams -> streams; layer L collapses them.

        Args:
            hidden_states: [s, b, h] ([s/tp, b, h] under sequence parallelism).
            *args: as Megatron's.
            context: tensors like hidden_states; None in layer 1, where all are the embedding.
            **kwargs: as Megatron's.
        """
        summed = partial(mix, fused=self.config.fused_blend)
        copies = (hidden_states,) * (self.config.hc_streams - 1)
        streams = (hidden_states, *(context or copies))
        read, update = self.self_attention_hyper_connection(streams)
        out, _ = self._forward_attention(*summed(read, streams), *args, **kwargs)
        streams = summed(update, (out, *streams))
        read, update = self.mlp_hyper_connection(streams)
        out = self._forward_mlp(
            *summed(read, streams),
            kwargs.get("inference_context"),
            padding_mask=kwargs.get("padding_mask"),
            packed_seq_params=kwargs.get("packed_seq_params"),
        )
        if self.layer_number == self.config.num_layers:
            return self.collapse(update, (out, *streams)), ()
        hidden_states, *others = summed(update, (out, *streams))
        return hidden_states, tuple(others)


def without_residual(training: bool, fused: bool) -> Callable[..., Tensor]:
    """Megatron's bias-dropout-add without the add; there is nothing to fuse."""

    def bias_dropout(
        x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float
    ) -> Tensor:
        x, bias = x_with_bias
        x = x.to(residual.dtype)
        x = x if bias is None else x + bias.to(residual.dtype)
        return torch.nn.functional.dropout(x, probability, training) if probability else x

    return bias_dropout


def leave_residual_out(
    submodules: TransformerLayerSubmodules, config: Any
) -> TransformerLayerSubmodules:
    """Submodules of a layer whose halves return what they computed alone."""
    return replace(submodules, self_attn_bda=without_residual, mlp_bda=without_residual)


NO_RESIDUAL = Row(
    "fused_residual_rmsnorm", "its norms hand on a residual that is added to nothing here"
)
STREAM_REFUSES = (
    *REFUSES,
    Row(
        "optimizer",
        "not tried with projections of streams",
        ("adam", "sgd", "lion", "muon", "dist_muon"),
    ),
    NO_RESIDUAL,
)


def carry(config: Any, n: int) -> Carry:
    """The streams beside the first."""
    return Carry(streams=config.hc_streams - 1)


def own_tensors(options: Any, n: int) -> list[OwnTensor]:
    """Of the connections of layer n, attention's and MLP's."""
    if n == 0:
        return []
    return [*_connection(options, 2 * n - 2), *_connection(options, 2 * n - 1)]


Start = Callable[[tuple[int, ...]], Tensor]


def connection_tensor(q: int, name: str, shape: tuple[int, ...], start: Start) -> OwnTensor:
    """Of the connection of sublayer q, from 0; vectors stay in float32."""
    ours, theirs = (("self_attention", "attn"), ("mlp", "mlp"))[q % 2]
    key, names = f"{ours}_hyper_connection.{name}", (f"{theirs}_hc.{name}",)
    return OwnTensor(key, names, shape, fp32=len(shape) == 1, start=start)


def _connection(options: Any, q: int) -> list[OwnTensor]:
    n, h = options.hc_streams, options.hidden_size
    build = partial(connection_tensor, q)
    static = [
        build("static_beta", (n,), torch.ones),
        build("static_alpha", (n * (1 + n),), lambda shape: starting_alpha(q, n).view(shape)),
    ]
    if not options.hc_dynamic:
        return static
    scale = partial(torch.full, fill_value=SCALE_INIT)
    if options.hc_form == "baseline":
        static.append(build("norm_gain", (h,), torch.ones))
    return [
        *static,
        build("dynamic_beta_proj", (h, 1), torch.zeros),
        build("dynamic_alpha_proj", (h, 1 + n), torch.zeros),
        build("dynamic_beta_scale", (1,), scale),
        build("dynamic_alpha_scale", (1,), scale),
    ]


def _has_no_gain(options: Any) -> str | None:
    if not options.hc_dynamic or options.hc_form == "baseline":
        return None
    return (
        f"hc_form ({options.hc_form}) must be baseline: in the paper's repository the norm of the "
        f"streams has a gain, and the epsilon {BASELINE_EPS:.3g}"
    )


HYPERCONNECTIONS = Architecture(
    name="hyperconnections",
    mfu=0.149,
    source="arXiv 2409.19606",
    equation=(
        "H' = A_r^T H + B^T T(A_m^T H), H the residual streams, T attention or MLP\n"
        "{config.hc_streams} streams, weights per token: {config.hc_dynamic}"
    ),
    about=(
        "H starts as copies of the embedding, and the final norm reads the sum of the streams. "
        "Every\nsublayer has weights A_m, A_r, B of its own. The KV cache is a plain "
        "Transformer's.\nHyper-Connections are described in arXiv 2409.19606."
    ),
    twin="megatron_satformer.model.reference.hyperconnections:HyperConnections",
    exported=(
        "megatron_satformer.checkpoint.exported.modeling_hyperconnections:"
        "HyperConnectionsForCausalLM"
    ),
    config=HyperConnectionsConfig,
    options=HyperConnectionsOptions,
    layer=HyperConnectionsLayer,
    adapt=leave_residual_out,
    carry=carry,
    tensors=own_tensors,
    refuses=STREAM_REFUSES,
    defaults=lambda preview: {"bias_dropout_fusion": False},  # of an add that does not happen
    from_transformer=None,
    paper=(
        PaperLayout(
            "dhc",
            "HyperConnectionsForCausalLM",
            names={"norm_gain": "norm.weight"},
            shapes=lambda options: {"static_alpha": (options.hc_streams, -1), "beta_proj": (-1,)},
            options={
                "hc_streams": "expansion_rate",
                "hc_dynamic": "use_dynamic_hc",
                "hc_tanh": "use_tanh",
            },
            read=lambda theirs: {"hc_form": "baseline" if theirs["use_dynamic_hc"] else "paper"},
            fixed=lambda options: {"hc_norm_type": "rms"},
            allowed=lambda theirs: {"hc_norm_type": ("rms",)} if theirs["use_dynamic_hc"] else {},
            refuse=_has_no_gain,
        ),
    ),
)
