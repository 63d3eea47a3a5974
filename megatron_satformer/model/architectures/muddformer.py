"""MUDDFormer: every layer reads four sums of what all earlier layers made (arXiv 2502.12170).

    X_0 = embedding,  X_n = output of layer n, residuals included
    A_n = GELU(RMSNorm(X_n) W1_n) W2_n + a_n        per token; the norm has no gain
    X^c_n = sum_j A^c_nj X_j,  over j <= n          c = q, k, v, r

Layer n + 1 adds attention, of the normed X^q_n, X^k_n and X^v_n, to X^r_n; layer 1 reads X_0 in all
four ways, with one norm. The final norm reads X^r_L, the one way behind the last layer. W2 starts
at 0 and a_n so that X^c_n = X_n: a plain Transformer. With --mudd-prepost-norm

    X^c_n = RMSNorm(sum_j A^c_nj RMSNorm(X_j)) + X_n

with a gain for every pair of a sum and what it reads, and one for every sum; a_n starts at 0.

The X^c_n are made by layer n + 1, so that a boundary takes X_0 .. X_n and no more; X^r_L by layer
L. Three inputs cost sequence parallelism three gathers where there was one.

Shapes: s sequence, b micro-batch, h hidden, C ways; "/tp": per rank.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.architectures.extended import REFUSES, ExtendedLayer
from megatron_satformer.model.architectures.mudd_sums import (
    NUM_WAYS,
    Aggregate,
    aggregate_tensors,
)
from megatron_satformer.model.architectures.muddformer_layouts import BASELINE, RELEASED
from megatron_satformer.model.architectures.record import Architecture, Carry, OwnTensor
from megatron_satformer.model.ways import NORM_KEYS, WayLinears, WayNorms, split_by_head
from megatron_satformer.unsupported import Row


@dataclass
class MuddFormerOptions:
    """MUDDFormer's own options."""

    mudd_prepost_norm: bool = False
    """Norm what is summed up and every sum, and add the newest output to each (muddformer), as its
    paper advises for deep and narrow models."""

    mudd_ffn_realloc: bool = False
    """Let the width of the MLPs grow linearly from 0.5 times --ffn-hidden-size in the first layer
    to 1.5 times in the last (muddformer), rounded to multiples of 128."""

    mudd_form: Literal["paper", "released", "baseline"] = "paper"
    """What the paper leaves open (muddformer). released: W1 wider, as in the models of its authors;
    baseline: norms of q, k and v in the first layer too, and multiples of 256, as in the repository
    of arXiv 2605.03953."""


@dataclass
class MuddFormerConfig(DecoderConfig, MuddFormerOptions):
    """DecoderConfig with sums of earlier layers' outputs."""

    layers_alike: ClassVar[bool] = False  # the later, the more it reads
    architecture: str = "muddformer"
    seed: int = 1234
    """Megatron's --seed: gives W1 its start, whatever the layout."""

    @classmethod
    def check_options(cls, options: Any, *, num_layers: int, groups: int, tp: int) -> None:
        """Refuse shapes and options that three inputs or MLPs of many widths cannot have."""
        if groups % tp:
            sizes = [str(n) for n in range(1, groups + 1) if groups % n == 0]
            raise ValueError(
                f"num_query_groups ({groups}) must be a multiple of tensor_model_parallel_size "
                f"({tp}): k and v are projected apart. Use TP {' or '.join(sizes)}."
            )
        if "layernorm" in (getattr(options, "recompute_modules", None) or ()):
            raise NotImplementedError(
                "recompute_modules (layernorm) is not supported with architecture "
                f"({options.architecture}): its input norm returns three tensors. Leave it out."
            )
        if options.mudd_ffn_realloc:
            _check_widths(options, num_layers, tp)

    @property
    def summary(self) -> str:
        """As DecoderConfig's."""
        norms = ", normed sums" if self.mudd_prepost_norm else ""
        widths = [ffn_width(self, n) for n in (1, self.num_layers)]
        ffn = f", MLPs {widths[0]} to {widths[1]} wide" if self.mudd_ffn_realloc else ""
        form = "" if self.mudd_form == "paper" else f", {self.mudd_form} form"
        return f"{self.architecture}{norms}{ffn}{form}"


def _check_widths(options: Any, num_layers: int, tp: int) -> None:
    experts = getattr(options, "num_experts", None) or getattr(options, "num_moe_experts", None)
    reason = ""
    if num_layers < 2:
        reason = f"num_layers ({num_layers}) of at least 2"
    elif experts:
        reason = f"dense layers, not num_experts ({experts})"
    elif 128 % tp:
        reason = f"tensor_model_parallel_size ({tp}) a divisor of 128"
    elif getattr(options, "from_transformer", False):
        reason = "weights of its own, not from_transformer (True), whose MLPs are all alike"
    if reason:
        raise ValueError(f"mudd_ffn_realloc (True) must come with {reason}. Leave it out.")


def ffn_width(options: Any, n: int) -> int:
    """Width of the MLP of layer n."""
    if not options.mudd_ffn_realloc:
        return options.ffn_hidden_size
    last, base = options.num_layers - 1, options.ffn_hidden_size
    if options.mudd_form == "baseline":  # the nearest multiple, the lower one of two
        share = (0.5 * (last + 1 - n) + 1.5 * (n - 1)) / last
        return max(1, (round(share * base) + 127) // 256) * 256
    return max(1, round((0.5 + (n - 1) / last) * base / 128)) * 128


def has_ways(options: Any, n: int) -> bool:
    """Whether layer n has a norm each for q, k and v, not one for all."""
    return n > 1 or options.mudd_form == "baseline"


class MuddFormerAttention(SelfAttention):
    """SelfAttention of three inputs, where a layer `has_ways`."""

    def __init__(
        self,
        config: MuddFormerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if has_ways(config, layer_number):
            linears = partial(WayLinears, submodules.linear_qkv)
            submodules = replace(submodules, linear_qkv=linears)
        super().__init__(config, submodules, layer_number, *args, **kwargs)

    # MegatronModule.sharded_state_dict, 0.19.2: where a Transformer's layers are one tensor, all
    # layers must read pieces of one size.
    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Megatron's entries; where a Transformer's are expected, all read head by head."""
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        alone = not has_ways(self.config, self.layer_number)
        if alone and self.config.expects_transformer:
            tp = self.pg_collection.tp
            for name, parameter in self.linear_qkv.named_parameters():
                key = f"{prefix}linear_qkv.{name}"
                if name in ("weight", "bias"):
                    heads = len(parameter) // self.config.kv_channels
                    mine = range(tp.rank() * heads, (tp.rank() + 1) * heads)
                    total = tp.size() * heads
                    entries[key] = split_by_head(key, entries[key], mine, total, sharded_offsets)
        return entries


class MuddFormerLayer(ExtendedLayer):
    """ExtendedLayer that reads the X^c_{n-1}; `context` and hidden_states are X_0 .. X_{n-1}."""

    config: MuddFormerConfig

    def __init__(
        self,
        config: MuddFormerConfig,
        submodules: TransformerLayerSubmodules,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if config.mudd_ffn_realloc:
            submodules = replace(submodules, mlp=partial(self._build_mlp, submodules.mlp))
        super().__init__(config, submodules, *args, **kwargs)
        n = self.layer_number
        self._norms_were_one = config.expects_transformer
        if n > 1:
            reads = aggregate_tensors(config, n - 1)
            self.aggregate = Aggregate(config, reads, self.tp_group)
        if has_ways(config, n):
            # A norm in the local backend; IdentityOp where Transformer Engine fuses it.
            self.input_layernorm = WayNorms(config, submodules.input_layernorm, self.tp_group)
            keys = NORM_KEYS | submodules.sharded_state_dict_keys_map
            self.submodules_config = replace(submodules, sharded_state_dict_keys_map=keys)
            self.register_load_state_dict_post_hook(_spread_norm)
        if n == config.num_layers:
            follows = aggregate_tensors(config, n)
            self.final_aggregate = Aggregate(config, follows, self.tp_group)

    def _build_mlp(self, build: Callable[..., Any], *, config: Any, **kwargs: Any) -> Any:
        # MLP (0.19.2) takes the width of its second linear from the config alone.
        config = copy(config)
        config.ffn_hidden_size = ffn_width(config, self.layer_number)
        return build(config=config, **kwargs)

    # TransformerLayer.forward, 0.19.2: the residual stream itself is what is summed up.
    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        context: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """X_0 .. X_{n-1} -> X_n and those before it; X^r_L behind the last layer.

        Args:
            hidden_states: X_{n-1}, [s, b, h] ([s/tp, b, h] under sequence parallelism).
            *args: as Megatron's.
            context: X_0 .. X_{n-2}; None in layer 1.
            **kwargs: as Megatron's.
        """
        history = (*(context or ()), hidden_states)
        reads: Any = hidden_states
        if self.layer_number > 1:
            reads = self.aggregate(history)
        elif has_ways(self.config, 1):
            reads = (hidden_states,) * NUM_WAYS
        hidden_states, _ = super().forward(reads, *args, **kwargs)
        if self.layer_number < self.config.num_layers:
            return hidden_states, history
        (residual,) = self.final_aggregate((*history, hidden_states))
        return residual, ()


@torch.no_grad()
def _spread_norm(layer: MuddFormerLayer, _: Any) -> None:
    """Give k and v the norm that q has got from a Transformer."""
    if not layer._norms_were_one:
        return
    layer._norms_were_one = False
    parameters = dict(layer.named_parameters())
    for name, parameter in parameters.items():
        for key in ("input_layernorm.q.", "self_attention.linear_qkv.q.layer_norm_"):
            if name.startswith(key):
                for way in "kv":
                    parameters[name.replace(".q.", f".{way}.")].copy_(parameter)


def own_tensors(options: Any, n: int) -> list[OwnTensor]:
    """Norms of k and v of layer n, and what makes its inputs; in layer L also what follows it."""
    found = []
    if n and has_ways(options, n):
        found += [
            OwnTensor(
                f"self_attention.linear_qkv.{way}.layer_norm_weight",
                (f"input_layernorm_{way}.weight",),
                (options.hidden_size,),
                start=torch.ones,
                like="input_layernorm.weight",
            )
            for way in "kv"
        ]
    if n > 1:
        found += aggregate_tensors(options, n - 1)
    if n and n == options.num_layers:
        found += aggregate_tensors(options, n)
    return found


def why_not_plain(options: Any) -> str | None:
    """Why it cannot start as a plain Transformer; None: it can."""
    if options.mudd_ffn_realloc:
        return "mudd_ffn_realloc (True) gives its MLPs other widths."
    return None


_ROWS = "it treats linear_qkv as one matrix, and here it is three"
MUDDFORMER = Architecture(
    name="muddformer",
    mfu=0.196,
    source="arXiv 2502.12170",
    equation=(
        "X^c_n = sum_j A^c_nj X_j, X_j the output of layer j, is what layer n + 1 reads as c = q, "
        "k, v, residual\nA_n = GELU(RMSNorm(X_n) W1_n) W2_n + a_n, per token"
    ),
    about=(
        "X_0 is the embedding, the final norm reads the residual way of X_L. The KV cache is a "
        "plain\nTransformer's. MUDDFormer is described in arXiv 2502.12170."
    ),
    twin="megatron_satformer.model.reference.muddformer:MuddFormer",
    exported="megatron_satformer.checkpoint.exported.modeling_muddformer:MuddFormerForCausalLM",
    config=MuddFormerConfig,
    options=MuddFormerOptions,
    attention=MuddFormerAttention,
    layer=MuddFormerLayer,
    carry=lambda config, n: Carry(streams=n),
    tensors=own_tensors,
    ffn_width=ffn_width,
    refuses=(
        *REFUSES,
        Row("tensor_parallel_num_weight_shards qk_clip", _ROWS),
        Row("optimizer", _ROWS, ("adam", "sgd", "lion", "muon", "dist_muon")),
        Row("normalization", "its norms have no bias", ("RMSNorm",)),
        Row("tp_comm_overlap", "its buffers are those of one linear_qkv"),
    ),
    plain_start=why_not_plain,
    from_transformer=None,
    paper=(BASELINE, RELEASED),
)
