"""Attention Residuals: every sublayer attends over what earlier ones made (arXiv 2603.15031).

    h = sum_j p_j b_j,  p = softmax_j(w . RMSNorm(b_j)),  the norm with a gain of its own

is what attention or MLP of a layer, or the final norm, reads: there is no residual. b_0 is the
embedding. In the block form b_1, b_2 .. are sums of what sublayers computed, over
attnres_block_layers layers each, the last of them still running; in the full form each sublayer is
a block of its own. Layers are the unit, as in Kimi K3: attention of layer n reads the sum of the
block that ends with layer n - 1, and begins the next one.

Queries w are zeros at the start: every source weighs the same, the sum of the sources is a
Transformer's residual, and each reader's norm takes their number out of it. In layer 1 there is one
source: its attention reads the embedding, and its query gets no gradient.

Kept for backward, per sublayer: what it computed, what it read and, for each source, scalars per
token; sources by reference, and their norms are computed again.

Shapes: s sequence, b micro-batch, h hidden; "/tp": per rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.architectures.extended import (
    REFUSES,
    Coefficients,
    ExtendedLayer,
    attach_end,
)
from megatron_satformer.model.architectures.hyperconnections import NO_RESIDUAL, leave_residual_out
from megatron_satformer.model.architectures.layouts import FLA, PaperLayout
from megatron_satformer.model.architectures.record import Architecture, Carry, OwnTensor
from megatron_satformer.model.mixing import normed_products, weighted_sum

BLOCKS = 8  # as many as the paper has, where nobody says how long one is


@dataclass
class AttnResOptions:
    """Attention Residuals' own options."""

    attnres_form: Literal["block", "full"] = "block"
    """What a source is (attnres). block: the sum of what the sublayers of some layers computed;
    full: what one sublayer computed, so that 2n + 1 of them cross the boundary behind layer n."""

    attnres_block_layers: int | None = None
    """Layers that one source sums up in the block form (attnres). Default: an eighth of num_layers,
    rounded up."""


@dataclass
class AttnResConfig(DecoderConfig, AttnResOptions):
    """DecoderConfig whose sublayers attend over sources."""

    architecture: str = "attnres"

    @classmethod
    def check_options(cls, options: Any, *, num_layers: int, groups: int, tp: int) -> None:
        """Refuse blocks of no length, or of one that is not heeded."""
        layers = options.attnres_block_layers
        if layers is None:
            return
        if options.attnres_form == "full":
            raise ValueError(
                f"attnres_block_layers ({layers}) must be left out with attnres_form (full): every "
                "sublayer is a source of its own."
            )
        if not 1 <= layers <= num_layers:
            raise ValueError(
                f"attnres_block_layers ({layers}) must be at least 1 and at most num_layers "
                f"({num_layers}). Leave it out for {-(-num_layers // BLOCKS)}."
            )

    @property
    def summary(self) -> str:
        """As DecoderConfig's."""
        if self.attnres_form == "full":
            return f"{self.architecture}, full"
        return f"{self.architecture}, blocks of {block_layers(self)} layers"


def block_layers(options: Any) -> int:
    """Layers that one source sums up in the block form."""
    return options.attnres_block_layers or -(-options.num_layers // BLOCKS)


def begins_block(options: Any, n: int) -> bool:
    """Whether attention of layer n begins a source, and its MLP reads the one before as ended."""
    return options.attnres_form == "full" or (n - 1) % block_layers(options) == 0


class DepthQuery(Coefficients):
    """What one reader reads of all sources."""

    def forward(self, sources: Sequence[Tensor]) -> Tensor:
        """Tensors [s, b, h] ([s/tp, b, h] under sequence parallelism) -> their weighted mean."""
        eps, fused = self.config.layernorm_epsilon, self.config.fused_blend
        wide = torch.promote_types(self.query.dtype, torch.float32)
        weight = (self.gain.to(wide) * self.query.to(wide)).unsqueeze(-1)
        scores = normed_products(sources, weight, eps, fused=fused).squeeze(-1)
        return weighted_sum(scores.softmax(-1), sources, fused=fused)  # scores [s, b, sources]


class AttnResLayer(ExtendedLayer):
    """ExtendedLayer of sources: `context` are those that ended, hidden_states is the newest."""

    config: AttnResConfig

    def __init__(self, config: AttnResConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for place in ("self_attention_res", "mlp_res"):
            setattr(self, place, DepthQuery(config, _query(config, place), self.tp_group))

    # TransformerLayer.forward, 0.19.2: what its two halves read is no residual stream, and what
    # they return is not added to one (see without_residual).
    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        context: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Sources -> sources; layer L returns what the final norm reads.

        Args:
            hidden_states: [s, b, h] ([s/tp, b, h] under sequence parallelism).
            *args: as Megatron's.
            context: tensors like hidden_states; None in layer 1.
            **kwargs: as Megatron's.
        """
        full = self.config.attnres_form == "full"
        sources = (*(context or ()), hidden_states)
        out, _ = self._forward_attention(self.self_attention_res(sources), *args, **kwargs)
        sources = _add(sources, out, begins_block(self.config, self.layer_number))
        out = self._forward_mlp(
            self.mlp_res(sources),
            kwargs.get("inference_context"),
            padding_mask=kwargs.get("padding_mask"),
            packed_seq_params=kwargs.get("packed_seq_params"),
        )
        *ended, newest = _add(sources, out, full)
        for final_query in self.end:
            return final_query((*ended, newest)), ()
        return newest, tuple(ended)


def _add(sources: Sequence[Tensor], out: Tensor, begins: bool) -> tuple[Tensor, ...]:
    """Sources with what a sublayer computed, as a new one or in the newest."""
    return (*sources, out) if begins else (*sources[:-1], sources[-1] + out)


def carry(config: Any, n: int) -> Carry:
    """Sources beside the newest: the embedding, and blocks that ended."""
    ended = 2 * n if config.attnres_form == "full" else -(-n // block_layers(config))
    return Carry(streams=ended)


def own_tensors(options: Any, n: int) -> list[OwnTensor]:
    """Queries and gains of layer n, attention's and the MLP's; for n = 0 the final norm's."""
    if n == 0:
        return _query(options, "final_res")
    return [*_query(options, "self_attention_res"), *_query(options, "mlp_res")]


def _query(options: Any, place: str) -> list[OwnTensor]:
    """Vectors, which are not decayed."""
    theirs = place.replace("self_attention", "attn")
    return [
        OwnTensor(
            f"{place}.{name}", (f"{theirs}.{name}",), (options.hidden_size,), fp32=True, start=start
        )
        for name, start in (("gain", torch.ones), ("query", torch.zeros))
    ]


def _read_fla(theirs: Any) -> dict[str, Any]:
    size = theirs["attnres_block_size"]
    if size == 1:
        return {"attnres_form": "full"}
    return {"attnres_block_layers": size // 2}


def _write_fla(options: Any) -> dict[str, int]:
    full = options.attnres_form == "full"
    return {"attnres_block_size": 1 if full else 2 * block_layers(options)}


def _whole_layers(theirs: Any) -> dict[str, tuple[int, ...]]:
    size = theirs["attnres_block_size"]
    allowed = (1, *range(2, 2 * theirs["num_hidden_layers"] + 1, 2))
    return {} if size in allowed else {"attnres_block_size": allowed}


ATTNRES = Architecture(
    name="attnres",
    source="arXiv 2603.15031",
    equation=(
        "h = sum_j p_j b_j, p = softmax_j(w . RMSNorm(b_j)), is what every sublayer reads\n"
        "b_0 the embedding, b_j sums of what sublayers computed; form: {config.attnres_form}, "
        "layers of a block: {config.attnres_block_layers}"
    ),
    about=(
        "There is no residual stream; the final norm reads such a sum too. Every reader has a "
        "query w and a\ngain of its own. The KV cache is a plain Transformer's. Attention "
        "Residuals are described in\narXiv 2603.15031."
    ),
    twin="megatron_satformer.model.reference.attnres:AttnRes",
    exported="megatron_satformer.checkpoint.exported.modeling_attnres:AttnResForCausalLM",
    config=AttnResConfig,
    options=AttnResOptions,
    layer=AttnResLayer,
    adapt=leave_residual_out,
    carry=carry,
    tensors=own_tensors,
    finish=lambda chunk, place: attach_end(chunk, "final_res", DepthQuery),
    refuses=(*REFUSES, NO_RESIDUAL),
    defaults=lambda preview: {"bias_dropout_fusion": False},  # of an add that does not happen
    from_transformer=None,
    paper=(
        PaperLayout(
            "transformer",
            "TransformerForCausalLM",
            names={
                r"\.(attn|mlp)_res\.gain": r".\1_res_norm.weight",
                r"\.(attn|mlp)_res\.query": r".\1_res_proj.weight",
                r"model\.final_res\.gain": "model.res_norm.weight",
                r"model\.final_res\.query": "model.res_proj.weight",
            },
            shapes=lambda options: {r"_res\.query": (1, -1)},
            read=_read_fla,
            fixed=_write_fla,
            allowed=_whole_layers,
            repository=FLA,
        ),
    ),
)
