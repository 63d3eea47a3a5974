"""LIMe: every KV head reads keys and values of all heads of all layers so far (arXiv 2502.09245).

    [K; V]_n  = W_kv,n x_n                              as projected: no norm, no RoPE, not routed
    [K'; V']_n,g = sum_l sum_j R_n[g, l, j] [K; V]_l,j  over layers l <= n and KV heads j; n >= 2

One R for keys and values. QK-norm, which the paper does not have, and RoPE come after it: a sum of
normed keys would not be normed. Q is a Transformer's. The cache holds K' and V', so decoding costs
what it costs a Transformer.

Under tensor parallelism K and V stay where their heads are, and so do the columns of R that read
them: a rank sums up what its heads give to all heads of the model, and one reduce-scatter per
layer, of 2 kv per token, gives it the sums of its own.

Shapes: s sequence, b micro-batch, ng KV heads, hn head dim; "/tp" marks what a rank holds.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar, Literal

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.architectures.extended import REFUSES
from megatron_satformer.model.architectures.history import HistoryAttention, HistoryLayer
from megatron_satformer.model.architectures.record import Architecture, Carry, OwnTensor
from megatron_satformer.model.architectures.value_residual import refuse_split_heads
from megatron_satformer.model.mixing import mix_heads
from megatron_satformer.unsupported import Row

ROUTER = "lime_router"


@dataclass
class LIMeOptions:
    """LIMe's own options."""

    lime_router_init: Literal["uniform", "identity"] = field(
        default="uniform", metadata={"changeable": True}
    )
    """Where the routers of lime start. Both read the own layer head by head; of earlier layers
    uniform reads random sums, as published, identity nothing, which is a plain Transformer: for
    --from-transformer."""

    lime_router_lr_mult: float = field(default=10.0, metadata={"changeable": True})
    """Learning rate of lime's routers, in multiples of --lr and --min-lr; 10 as published. Nothing
    decays them. A run goes on with the factor that its optimizer's state was saved with."""


@dataclass
class LIMeConfig(DecoderConfig, LIMeOptions):
    """DecoderConfig with routers over layers and KV heads."""

    layers_alike: ClassVar[bool] = False  # the later, the more it reads
    architecture: str = "lime"

    @classmethod
    def check_options(cls, options: Any, *, num_layers: int, groups: int, tp: int) -> None:
        """Refuse a model that routes nothing, heads that ranks would share, and no learning."""
        if num_layers < 2:
            raise ValueError(
                f"num_layers ({num_layers}) must be at least 2 for architecture "
                f"({options.architecture}): layer 1 reads its own keys and values alone."
            )
        if not 0 < options.lime_router_lr_mult < inf:
            raise ValueError(
                f"lime_router_lr_mult ({options.lime_router_lr_mult}) must be more than 0 and "
                "finite: it is a factor of the learning rate. Leave it out for 10."
            )
        refuse_split_heads(groups, tp, "keys and values are")

    @property
    def summary(self) -> str:
        """As DecoderConfig's."""
        return f"{self.architecture}, routers at {self.lime_router_lr_mult:g} x lr"

    @property
    def warning(self) -> str | None:
        """What is wrong with a Transformer's weights and routers that read random sums."""
        if not self.from_transformer or self.lime_router_init == "identity":
            return None
        return (
            f"lime_router_init ({self.lime_router_init}) with from_transformer (True): routers "
            "that read random sums of earlier layers do not start as that Transformer. Use "
            "--lime-router-init identity."
        )


def identity_router(shape: tuple[int, ...]) -> Tensor:
    """Values of R_n [ng, n, ng] with which K' = K and V' = V."""
    router = torch.zeros(shape, device="cpu")
    router[:, -1].fill_diagonal_(1)
    return router


def starting_router(config: Any, shape: tuple[int, ...]) -> Tensor:
    """Values of R_n [ng, n, ng] at init; those of earlier layers of variance 1 / (n ng)."""
    router = identity_router(shape)
    if config.lime_router_init == "uniform":
        bound = (3 / (shape[1] * shape[2])) ** 0.5
        router[:, :-1].uniform_(-bound, bound)
    return router


class LIMeAttention(HistoryAttention):
    """HistoryAttention that reads routed keys and values of all layers so far."""

    config: LIMeConfig

    def __init__(
        self, config: LIMeConfig, submodules: Any, layer_number: int, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        for tensor in own_tensors(config, layer_number):
            tp = self.pg_collection.tp
            mine = starting_router(config, tensor.shape).chunk(tp.size(), dim=2)[tp.rank()]
            device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
            values = mine.to(device, config.params_dtype, copy=True).contiguous()
            self.lime_router = torch.nn.Parameter(values)  # [ng, n, ng/tp]
            set_tensor_model_parallel_attributes(self.lime_router, True, 2, 1)

    # SelfAttention.get_query_key_value_tensors, 0.19.2: the narrowest place where K and V are whole
    # and neither RoPE, attention nor the KV cache has seen them.
    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """As SelfAttention's, K and V routed, and Q and K normed then."""
        with self._norms_held_back():
            query, key, value, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        # Copies all three: one view would keep the layer's whole QKV buffer alive until backward.
        query = query.contiguous()
        self._history = (*self.history, _by_head(key), _by_head(value))
        if self.layer_number > 1:
            key, value = self._read_history()
        key, value = key.contiguous(), value.contiguous()
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        return query, key, value, *rest

    @contextmanager
    def _norms_held_back(self) -> Iterator[None]:
        norms = {name: getattr(self, name) for name in ("q_layernorm", "k_layernorm")}
        for name in norms:
            setattr(self, name, None)
        try:
            yield
        finally:
            for name, norm in norms.items():
                setattr(self, name, norm)

    def _read_history(self) -> tuple[Tensor, Tensor]:
        """K' and V' of this layer, [s, b, ng/tp, hn] each."""
        s, b, heads, hn = self.history[0].shape
        keys, values = ([x.view(heads, -1) for x in self.history[i::2]] for i in (0, 1))
        given = mix_heads(
            self.lime_router, keys, values, fused=self.config.fused_blend
        )  # [ng, 2, s b hn], by this rank's heads
        mixed = reduce_scatter_to_sequence_parallel_region(given, self.pg_collection.tp)
        key, value = mixed.view(heads, 2, s, b, hn).permute(1, 2, 3, 0, 4).unbind()
        return key, value

    # Module-level sharded_state_dict, 0.19.2: parameters of the module itself count as replicated.
    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Megatron's entries, the router's cut by the heads that it reads."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        own = {name: p for name, p in self.named_parameters(recurse=False) if name == ROUTER}
        return entries | make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            {ROUTER: 2},
            sharded_offsets,
            tp_group=self.pg_collection.tp,
            dp_cp_group=metadata["dp_cp_group"],
        )


def _by_head(x: Tensor) -> Tensor:
    """A copy that has one head behind the other in memory, under the shape that boundaries know.

    Then a router reads it, as [ng/tp, s b hn], in one product and without another copy. A boundary
    takes and gives contiguous tensors, in whatever order their numbers are.

    Args:
        x: [s, b, ng/tp, hn].
    """
    return x.movedim(2, 0).contiguous().view(x.shape)


def carry(config: Any, n: int) -> Carry:
    """K and V of every layer so far."""
    return Carry(heads=2 * n)


def own_tensors(options: Any, n: int) -> list[OwnTensor]:
    """Router of layer n."""
    if n < 2:
        return []
    shape = (options.num_query_groups, n, options.num_query_groups)
    name = f"self_attention.{ROUTER}"
    return [OwnTensor(name, (f"self_attn.{ROUTER}",), shape, fp32=True, start=identity_router)]


def router_group(args: Namespace) -> dict[str, dict[str, float]]:
    """Routers are not decayed and learn at their own rate."""
    rates = {"max_lr": args.lr, "min_lr": args.min_lr}
    scaled = {n: rate * args.lime_router_lr_mult for n, rate in rates.items() if rate is not None}
    return {f"*.{ROUTER}": {"wd_mult": 0.0, **scaled}}


LIME = Architecture(
    name="lime",
    mfu=0.192,
    source="arXiv 2502.09245",
    equation=(
        "[K'; V']_n,g = sum_l sum_j R_n[g, l, j] [K; V]_l,j\n"
        "over layers l <= n and KV heads j, for n >= 2"
    ),
    about=(
        "K_l and V_l are projected and nothing more; R_n is one learned matrix for both. QK-norm "
        "and RoPE come\nafter it. The KV cache holds K' and V', so decoding costs what it costs a "
        "plain Transformer. LIMe is\ndescribed in arXiv 2502.09245."
    ),
    twin="megatron_satformer.model.reference.lime:LIMe",
    exported="megatron_satformer.checkpoint.exported.modeling_lime:LIMeForCausalLM",
    config=LIMeConfig,
    options=LIMeOptions,
    attention=LIMeAttention,
    layer=HistoryLayer,
    carry=carry,
    tensors=own_tensors,
    refuses=(
        *REFUSES,
        Row("qk_clip", "it scales a layer's own keys, and later layers read them"),
        Row("use_mup", "it would set the learning rate of the routers once more"),
    ),
    parameter_groups=router_group,
    from_transformer=None,
)
