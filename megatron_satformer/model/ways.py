"""Self-attention whose queries, keys and values are projections of three inputs.

Two modules stand in the place of Megatron's `input_layernorm` and `linear_qkv`; SelfAttention and
TransformerLayer stay as they are. A checkpoint holds the three projections as a plain Transformer's
one, so that either reads the other's. Must not know: architectures, where the inputs come from.

Shapes: s sequence, b micro-batch, h hidden, np heads, ng KV heads, hn head dim; "/tp": per rank.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ReplicaId,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_satformer.config import DecoderConfig

WAYS = "qkv"
# Where a checkpoint has the norms of the local backend: where Transformer Engine, which fuses them
# into the linears, has its own, the queries' under the key of a plain Transformer's one.
NORM_KEYS = {
    "input_layernorm.q.": "self_attention.linear_qkv.layer_norm_",
    "input_layernorm.k.": "self_attention.linear_qkv.k.layer_norm_",
    "input_layernorm.v.": "self_attention.linear_qkv.v.layer_norm_",
}


def _leave(weight: Tensor) -> None:
    """An init_method: what is there is filled later."""


class WayNorms(MegatronModule):
    """In the place of input_layernorm, which may return (output, residual) (0.19.2)."""

    def __init__(self, config: DecoderConfig, build: Callable[..., Any], tp_group: Any) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        for way in WAYS:
            norm = build(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
            setattr(self, way, norm)

    def forward(self, ways: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Inputs of q, k and v, and the residual -> the three normed, and the residual."""
        *inputs, residual = ways
        normed = (getattr(self, way)(x) for way, x in zip(WAYS, inputs, strict=True))
        return tuple(normed), residual


class WayLinears(MegatronModule):
    """In the place of linear_qkv: three projections of three inputs, Megatron's interleave out.

    Args:
        build: of each of the three, as linear_qkv itself is built.
        input_size: h.
        output_size: of all three together, over all ranks.
        config: of the model.
        name: of this module, as Megatron names it.
        **kwargs: as Megatron's.
    """

    config: DecoderConfig

    def __init__(
        self,
        build: Callable[..., Any],
        input_size: int,
        output_size: int,
        *,
        config: DecoderConfig,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config)
        self.tp_group = kwargs["tp_group"]
        kv, init_method = config.kv_projection_size, kwargs.pop("init_method")
        for way, rows in zip(WAYS, (output_size - 2 * kv, kv, kv), strict=True):
            place = None if name is None else f"{name}.{way}"
            own = build(input_size, rows, config=config, name=place, init_method=_leave, **kwargs)
            setattr(self, way, own)
        if config.perform_initialization:
            self._init_as_one(init_method)

    @torch.no_grad()
    def _init_as_one(self, init_method: Callable[[Tensor], Any]) -> None:
        """The weights that a plain linear_qkv would begin with, given the same seed."""
        q, k, v = (getattr(self, way).weight for way in WAYS)
        rows, ranks = len(q) + len(k) + len(v), self.tp_group.size()
        if self.config.use_cpu_initialization:  # Megatron draws the whole one and cuts it
            whole = torch.empty(rows * ranks, q.size(1))
            init_method(whole)
            fused = whole.chunk(ranks)[self.tp_group.rank()]
        else:
            fused = torch.empty(rows, q.size(1), device=q.device, dtype=q.dtype)
            with get_cuda_rng_tracker().fork():
                init_method(fused)
        groups = len(k) // self.config.kv_channels
        heads = fused.view(groups, -1, q.size(1))
        sizes = [len(weight) // groups for weight in (q, k, v)]
        for weight, part in zip((q, k, v), heads.split(sizes, dim=1), strict=True):
            weight.copy_(part.reshape(weight.shape))

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, None]:
        """Three inputs [s, b, h] ([s/tp, b, h] under sequence parallelism) -> [s, b, qkv/tp]."""
        q, k, v = (getattr(self, way)(x)[0] for way, x in zip(WAYS, inputs, strict=True))
        groups = k.size(-1) // self.config.kv_channels  # ng/tp
        heads = [t.unflatten(-1, (groups, -1)) for t in (q, k, v)]
        return torch.cat(heads, dim=-1).flatten(-2), None

    def backward_dw(self) -> None:
        """Weight gradients, where Megatron computes them apart."""
        for way in WAYS:
            getattr(self, way).backward_dw()

    # MegatronModule.sharded_state_dict, 0.19.2: three parameters are pieces of one tensor.
    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Weights and biases as pieces of a plain linear_qkv's; what else q has under its keys."""
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, entry in entries.items():
            way, _, rest = name.removeprefix(prefix).partition(".")
            if rest in ("weight", "bias"):
                key = f"{prefix}{rest}"
                entries[name] = self._by_head(key, entry, WAYS.index(way), sharded_offsets)
            elif way == "q":
                entry.key = f"{prefix}{rest}"
            elif rest == "_extra_state" and self.config.expects_transformer:
                entries[name] = LocalNonpersistentObject(entry.data)
        return entries

    def _by_head(
        self, key: str, whole: ShardedTensor, way: int, sharded_offsets: tuple
    ) -> ShardedTensorFactory:
        """Factory of the pieces of q, k or v: heads, in the interleave of a plain linear_qkv."""
        hn, tp = self.config.kv_channels, self.tp_group
        groups = self.k.weight.size(0) // hn  # ng/tp
        ratio = self.q.weight.size(0) // (hn * groups)  # np/ng; twice that with output gates
        mine = ([*range(ratio)], [ratio], [ratio + 1])[way]
        all_groups = range(tp.rank() * groups, (tp.rank() + 1) * groups)
        places = [group * (ratio + 2) + head for group in all_groups for head in mine]
        return split_by_head(key, whole, places, tp.size() * groups * (ratio + 2), sharded_offsets)


def split_by_head(
    key: str, whole: ShardedTensor, places: Sequence[int], total: int, sharded_offsets: tuple
) -> ShardedTensorFactory:
    """Factory of heads of one tensor, or of its optimizer states.

    Args:
        key: of the tensor that the heads are pieces of.
        whole: what a rank holds; each of its heads becomes a piece.
        places: of its heads in that tensor.
        total: heads in that tensor.
        sharded_offsets: as Megatron's.
    """
    axes, rows = len(sharded_offsets), len(whole.data) // len(places)

    @torch.no_grad()
    def build(key: str, tensor: Tensor, replica_id: ReplicaId, _: slice | None) -> list:
        return [
            ShardedTensor.from_rank_offsets(
                key,
                head,
                *sharded_offsets,
                (axes, place, total),
                replica_id=replica_id,
                prepend_axis_num=axes,
            )
            for head, place in zip(tensor.split(rows), places, strict=True)
        ]

    return ShardedTensorFactory(key, whole.data, build, torch.cat, whole.replica_id)
