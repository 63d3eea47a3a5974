"""mHC: Hyper-Connections whose streams are mixed by doubly stochastic matrices (arXiv 2512.24880).

    X' = M X + H_post^T T(H_pre X),  T attention or MLP with its own norm

X are hc_streams streams, copies of the embedding at the start. Of every sublayer, per token:

    P, Q, R = alpha * (RMSNorm(vec X) phi) + bias      the norm runs over all streams, without gain
    H_pre = sigmoid(P),  H_post = 2 sigmoid(Q),  H_res = Sinkhorn(exp R)

M is H_res, as the paper has it, or its transpose, as DeepSeek's kernels and Megatron-LM. The final
norm reads the mean of the streams, their sum, or a sum with weights per token,
sigmoid(scale (RMSNorm(vec X) fn) + base).

Streams that start alike stay alike where every one of them is written to in the same way. So phi
starts as Megatron-LM draws it, close to a Transformer; or as a Transformer exactly, phi at zero and
the streams told apart by how much of a sublayer each takes, 1 in the mean.

Kept for backward: what Hyper-Connections keep; of the weights what they are made from, so that
Sinkhorn's rounds run again.

Shapes: s sequence, b micro-batch, h hidden, n streams; "/tp": per rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.architectures.extended import (
    SEED,
    Coefficients,
    attach_end,
    seeded_generator,
)
from megatron_satformer.model.architectures.hyperconnections import (
    SCALE_INIT,
    STREAM_REFUSES,
    HyperConnectionsLayer,
    Start,
    StreamOptions,
    carry,
    connection_tensor,
    leave_residual_out,
    refuse_no_streams,
)
from megatron_satformer.model.architectures.record import Architecture, OwnTensor
from megatron_satformer.model.mixing import mix, products

EPS = 1e-6  # the least of softmax, from which Sinkhorn's rounds go on


@dataclass
class MHCOptions(StreamOptions):
    """mHC's own options."""

    mhc_residual: Literal["transposed", "plain"] = "transposed"
    """Which side of H_res, what Sinkhorn made, the streams are on (mhc). transposed: M is its
    transpose, as in DeepSeek's kernels and in Megatron-LM; plain: M is H_res, as the paper's
    equation has it. It makes no difference to training from the start, and all to a conversion."""

    mhc_collapse: Literal["mean", "sum", "head"] = "mean"
    """What the final norm reads of the streams (mhc). mean; sum; head: a sum whose weights each
    token gives, with parameters of its own, as in DeepSeek-V4."""

    mhc_sinkhorn_iterations: int = 20
    """Rounds in which rows, then columns, are made to sum to 1 (mhc)."""

    mhc_start: Literal["drawn", "transformer"] = field(
        default="drawn", metadata={"changeable": True}
    )
    """Where training starts (mhc). drawn: projections from Xavier's uniform distribution, close to
    a Transformer, as in Megatron-LM; transformer: projections of zeros, exactly a Transformer, and
    streams that differ in how much of a sublayer they take."""


@dataclass
class MHCConfig(DecoderConfig, MHCOptions):
    """DecoderConfig with residual streams that keep their mean."""

    architecture: str = "mhc"
    seed: int = SEED
    """Megatron's --seed: gives projections their start, whatever the layout."""

    @classmethod
    def check_options(cls, options: Any, *, num_layers: int, groups: int, tp: int) -> None:
        """Refuse no streams, and matrices that are not normalised at all."""
        refuse_no_streams(options)
        rounds = options.mhc_sinkhorn_iterations
        if rounds < 1:
            raise ValueError(
                f"mhc_sinkhorn_iterations ({rounds}) must be at least 1. Leave it out for 20."
            )

    @property
    def summary(self) -> str:
        """As DecoderConfig's."""
        form = f"{self.mhc_residual}, {self.mhc_collapse}"
        return f"{self.architecture}, {self.hc_streams} streams, {form}"


def sinkhorn(logits: Tensor, rounds: int) -> Tensor:
    """exp(logits) with rows and columns divided by their sums in turn, columns last.

    The least entry is that of DeepSeek's kernels and Megatron-LM; what they add to the sums is left
    out, so that the mean of the streams is kept, and leads to the same matrix.

    Args:
        logits: [..., n, n], float32 at least.
        rounds: how often both.

    Returns:
        [..., n, n]: columns sum to 1, and rows almost.
    """
    # tokens on the last axis: sums over four numbers each are slow
    matrices = logits.flatten(0, -3).movedim(0, -1).contiguous()
    matrices = matrices.softmax(1) + EPS
    matrices = matrices / matrices.sum(0, keepdim=True)
    for _ in range(rounds - 1):
        matrices = matrices / matrices.sum(1, keepdim=True)
        matrices = matrices / matrices.sum(0, keepdim=True)
    return matrices.movedim(-1, 0).view(logits.shape)


def normed_projection(
    streams: Sequence[Tensor], weight: Tensor, eps: float, fused: bool
) -> tuple[Tensor, Tensor]:
    """What RMSNorm(vec X) weight^T is made of, [..., k] and [..., 1]; weight is [k, n h]."""
    width = streams[0].size(-1)
    (total, mean), *others = (
        products((x,), part, fused=fused)
        for x, part in zip(streams, weight.t().split(width), strict=True)
    )
    for product, square in others:
        total, mean = total + product, mean + square
    return total.squeeze(-2), mean.squeeze(-2) / len(streams) + eps


class ManifoldConnection(Coefficients):
    """How one sublayer reads the streams, and how it writes to them; see `_connection`."""

    def forward(self, streams: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As HyperConnection's: H_pre [s, b, 1, n]; H_post and M [s, b, n, 1 + n]."""
        config = self.config
        total, square = normed_projection(
            streams, self.mapping_proj.weight, config.layernorm_epsilon, config.fused_blend
        )
        return checkpoint(self._weigh, total, square, use_reentrant=False, preserve_rng_state=False)

    def _weigh(self, total: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        n = self.config.hc_streams
        alphas = self.alpha_pre.expand(n), self.alpha_post.expand(n), self.alpha_res.expand(n * n)
        scale = torch.cat(alphas).to(total.dtype)
        logits = total * torch.rsqrt(square) * scale + self.bias.to(total.dtype)
        read, write, kept = logits.split([n, n, n * n], dim=-1)
        matrix = sinkhorn(kept.unflatten(-1, (n, n)), self.config.mhc_sinkhorn_iterations)
        if self.config.mhc_residual == "transposed":
            matrix = matrix.transpose(-1, -2)
        written = 2 * write.sigmoid().unsqueeze(-1)
        return read.sigmoid().unsqueeze(-2), torch.cat((written, matrix), dim=-1)


class Head(Coefficients):
    """What the final norm reads of the streams where parameters say it."""

    def forward(self, streams: Sequence[Tensor]) -> Tensor:
        """Streams [s, b, h] ([s/tp, b, h] under sequence parallelism) -> one such tensor."""
        eps, fused = self.config.layernorm_epsilon, self.config.fused_blend
        total, square = normed_projection(streams, self.fn, eps, fused)
        scale, base = self.scale.to(total.dtype), self.base.to(total.dtype)
        weights = (total * torch.rsqrt(square) * scale + base).sigmoid()
        return mix(weights.unsqueeze(-2), streams, fused=fused)[0]


class MHCLayer(HyperConnectionsLayer):
    """HyperConnectionsLayer with other weights and another end."""

    connection = ManifoldConnection

    def collapse(self, update: Tensor, sources: tuple[Tensor, ...]) -> Tensor:
        """As HyperConnectionsLayer's, by --mhc-collapse."""
        for head in self.end:
            return head(mix(update, sources, fused=self.config.fused_blend))
        if self.config.mhc_collapse == "mean":
            update = update / self.config.hc_streams
        return super().collapse(update, sources)


def own_tensors(options: Any, n: int) -> list[OwnTensor]:
    """Of the connections of layer n, attention's and MLP's; for n = 0 the head's."""
    if n:
        return [*_connection(options, 2 * n - 2), *_connection(options, 2 * n - 1)]
    if options.mhc_collapse != "head":
        return []
    streams = options.hc_streams

    def build(name: str, shape: tuple[int, ...], start: Start) -> OwnTensor:
        key = f"hc_head.{name}"
        return OwnTensor(key, (key,), shape, fp32=len(shape) == 1, start=start)

    return [
        build("fn", (streams, streams * options.hidden_size), torch.zeros),
        build("base", (streams,), torch.zeros),
        build("scale", (1,), partial(torch.full, fill_value=SCALE_INIT)),
    ]


def starting_projection(shape: tuple[int, ...], q: int, seed: int) -> Tensor:
    """Projection of sublayer q, Xavier's uniform distribution."""
    bound = (6 / sum(shape)) ** 0.5
    generator = seeded_generator(seed, q)
    return (2 * torch.rand(shape, generator=generator, device="cpu") - 1) * bound


def starting_bias(shape: tuple[int, ...], streams: int) -> Tensor:
    """Bias with which H_post is between 0.5 and 1.5, another of each stream, and 1 in the mean."""
    bias = torch.zeros(shape, device="cpu")
    more = torch.arange(1 - streams, streams, 2, device="cpu") / (2 * streams)
    bias[streams : 2 * streams] = ((1 + more) / (1 - more)).log()
    return bias


def _connection(options: Any, q: int) -> list[OwnTensor]:
    """Named as in Megatron-LM: rows of phi and bias are P, Q and R, one behind the other."""
    n, h = options.hc_streams, options.hidden_size
    k = n * n + 2 * n
    seed, scale = getattr(options, "seed", SEED), partial(torch.full, fill_value=SCALE_INIT)
    plain = getattr(options, "mhc_start", "transformer") == "transformer"
    phi = torch.zeros if plain else partial(starting_projection, q=q, seed=seed)
    bias = partial(starting_bias, streams=n) if plain else torch.zeros
    return [
        connection_tensor(q, "mapping_proj.weight", (k, n * h), phi),
        *(connection_tensor(q, f"alpha_{name}", (1,), scale) for name in ("pre", "post", "res")),
        connection_tensor(q, "bias", (k,), bias),
    ]


MHC = Architecture(
    name="mhc",
    source="arXiv 2512.24880",
    equation=(
        "X' = M X + H_post^T T(H_pre X), X the residual streams, M doubly stochastic\n"
        "{config.hc_streams} streams, M by {config.mhc_sinkhorn_iterations} rounds of Sinkhorn's, "
        "{config.mhc_residual}; the final norm reads: {config.mhc_collapse}"
    ),
    about=(
        "X starts as copies of the embedding, and T is attention or MLP. Every sublayer has "
        "weights of its own,\nwhich each token gives. The KV cache is a plain Transformer's. "
        "mHC is described in arXiv 2512.24880."
    ),
    twin="megatron_satformer.model.reference.mhc:MHC",
    exported="megatron_satformer.checkpoint.exported.modeling_mhc:MHCForCausalLM",
    config=MHCConfig,
    options=MHCOptions,
    layer=MHCLayer,
    adapt=leave_residual_out,
    carry=carry,
    tensors=own_tensors,
    finish=lambda chunk, place: attach_end(chunk, "hc_head", Head),
    refuses=STREAM_REFUSES,
    defaults=lambda preview: {"bias_dropout_fusion": False},  # of an add that does not happen
    from_transformer=None,
)
