"""SATFormer: V'_n = V_n + gate(W_gate x_n) * V_1 (arXiv 2605.03953).

W_gate reads exactly what linear_qkv reads, so its rows ride in that GEMM: no extra kernel and no
extra collective, also where Transformer Engine fuses the norm into linear_qkv and under sequence
parallelism. Rows of linear_qkv on one tensor-parallel rank:

    [ q,k,v of its KV groups, Megatron's interleave | gate, ng/tp | zero padding to 16 ]

The padding keeps the GEMM's width legal for fp8 and q/k/v aligned; its gradient is exactly zero.
Checkpoints hold the pieces apart and know neither padding nor parallelism.

Shapes: s sequence, b micro-batch, h hidden, np heads, ng KV heads, hn head dim; "/tp": per rank.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ReplicaId,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.utils import init_method_normal
from torch import Tensor

from megatron_satformer.model.architectures.gate_options import (
    CHANNELS,
    CONSTANT,
    CONTROLS,
    SATFormerConfig,
    SATFormerOptions,
    gate_rows,
    is_convex,
    own_tensors,
    why_not_from_zero,
    why_not_published,
)
from megatron_satformer.model.architectures.layouts import PaperLayout
from megatron_satformer.model.architectures.record import Architecture
from megatron_satformer.model.architectures.value_residual import (
    REFUSES,
    ValueResidualAttention,
    ValueResidualLayer,
    carry_v1,
    describe_mixing,
    replica_defaults,
)
from megatron_satformer.model.attention import Fused
from megatron_satformer.model.gates import ChannelGate, ConstantGate, apply_gate, draw_apart
from megatron_satformer.model.mixing import ELEMENTWISE, gated_sum
from megatron_satformer.unsupported import Row

ROW_MULTIPLE = 16  # fp8 GEMMs want multiples of 16; 16 bf16 elements are 32 bytes


class SATFormerAttention(ValueResidualAttention):
    """ValueResidualAttention gated per token and KV head; the gate rows ride in linear_qkv."""

    def __init__(
        self,
        config: SATFormerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self.gate_rows = gate_rows(config) if config.mixes(layer_number) else 0
        if self.gate_rows:
            widened = _widened(submodules.linear_qkv, self.gate_rows)
            submodules = replace(submodules, linear_qkv=widened)
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        self.alpha_observer: Callable[[int, Callable[[], Tensor]], None] | None = None
        self._gate_logits: Tensor | None = None
        if self.mixes:
            self._add_gate_modules()
        if self.gate_rows:
            self._init_gate_rows()
            self.linear_qkv.register_forward_hook(self._keep_gate_logits)
        if config.expects_transformer:
            self.register_load_state_dict_post_hook(_transformer_was_read)

    def _add_gate_modules(self) -> None:
        """What a gate has beside its rows of linear_qkv."""
        heads, tp = self.num_query_groups_per_partition, self.pg_collection.tp
        start = self.config.value_gate_bias_init
        if self.config.value_gate == CONSTANT:
            self.value_gate = ConstantGate(self.config, heads, start, tp, self.layer_number)
        elif self.config.value_gate == CHANNELS:
            self.value_gate_up = ChannelGate(
                self.config, heads, self.gate_rows, start, tp, self.layer_number
            )

    @property
    def _row_counts(self) -> list[int]:
        """Rows of linear_qkv on this rank: q/k/v, gate, padding."""
        heads = self.num_attention_heads_per_partition
        if self.config.attention_output_gate:
            heads *= 2
        groups = self.num_query_groups_per_partition
        qkv = (heads + 2 * groups) * self.hidden_size_per_attention_head
        gate = self.gate_rows // self.pg_collection.tp.size()
        return [qkv, gate, _padding(qkv + gate)]

    def blend(self, value: Tensor, v1: Tensor) -> Tensor:
        """V + alpha V1, or, convex, (1 - alpha) V + alpha V1. value, v1: [s, b, ng/tp, hn]."""
        logits, self._gate_logits = self._gate_logits, None
        assert logits is not None or not self.gate_rows, "linear_qkv did not run before blend"
        gate, tp = self.config.value_gate, self.pg_collection.tp
        if self.alpha_observer is not None and self.training:
            seen = None if logits is None else logits.detach()
            self.alpha_observer(self.layer_number, partial(self._alpha, seen))
        if is_convex(self.config):
            return torch.lerp(value, v1, self._alpha(logits).to(value.dtype))
        if logits is None or self.config.value_gate_offset:
            alpha = self._alpha(logits).to(value.dtype).squeeze(-1)
            logits, gate = alpha.expand(value.shape[:-1]).contiguous(), "identity"
        elif gate not in ELEMENTWISE:
            logits, gate = apply_gate(logits, gate, tp), "identity"  # alpha, [s, b, ng/tp]
        fused, kept = self.config.fused_blend, self.buffer_is_kept(value)
        return gated_sum(value, logits, v1, gate, fused=fused, in_place=kept and self.is_local)

    def _alpha(self, logits: Tensor | None) -> Tensor:
        """[s, b, ng/tp, 1], per channel [s, b, ng/tp, hn], without input [ng/tp, 1]."""
        if logits is None:
            return self.value_gate()
        if self.config.value_gate == CHANNELS:
            return self.value_gate_up(logits)
        alpha = apply_gate(logits, self.config.value_gate, self.pg_collection.tp)
        return self.config.value_gate_offset + alpha.unsqueeze(-1)

    # SelfAttention.get_query_key_value_tensors, 0.19.2: linear_qkv runs inside, and so does blend.
    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """As ValueResidualAttention's; a call that fails leaves no logits on the module."""
        try:
            return super().get_query_key_value_tensors(*args, **kwargs)
        finally:
            self._gate_logits = None

    def _keep_gate_logits(self, module: Any, inputs: Any, output: tuple[Tensor, Any]) -> Any:
        # A hook, because SelfAttention (0.19.2) calls linear_qkv and splits its output itself.
        fused, bias = output
        if Fused.is_split_by_torch():
            return Fused(fused, self._row_counts, partial(setattr, self, "_gate_logits")), bias
        qkv, self._gate_logits, _ = fused.split(self._row_counts, dim=-1)
        return qkv, bias

    @torch.no_grad()
    def _init_gate_rows(self) -> None:
        weight, bias = self.linear_qkv.weight, self.linear_qkv.bias
        _, gate, _ = weight.split(self._row_counts)
        # For backend/muon.py: what the rows are, and those of q, k and v in each group of heads.
        heads, head = self.num_attention_heads_per_partition, self.hidden_size_per_attention_head
        queries = heads // self.num_query_groups_per_partition * head
        gated = [queries] if self.config.attention_output_gate else []
        weight.qkv_split_shapes = (*self._row_counts,), (queries, *gated, head, head)
        if self.config.perform_initialization:
            std, tp = self.config.value_gate_init_std, self.pg_collection.tp
            init = self.config.init_method if std is None else init_method_normal(std)
            drawn = draw_apart(init, (self.gate_rows, weight.size(1)), self.layer_number)
            gate.copy_(drawn.chunk(tp.size())[tp.rank()])
        if self._has_bias:
            # linear_qkv has one bias for all its rows: those nobody asked for stay at their 0.
            keep = [self._has_qkv_bias, self.config.value_gate_bias, False]
            kept = zip(self._row_counts, keep, strict=True)
            mask = torch.cat([bias.new_full((rows,), float(k)) for rows, k in kept])
            if self.config.value_gate_bias:
                bias.split(self._row_counts)[1].fill_(self.config.value_gate_bias_init)
            bias.register_hook(lambda gradient: gradient * mask.to(gradient))

    @property
    def _has_qkv_bias(self) -> bool:
        return self.config.add_bias_linear or self.config.add_qkv_bias

    @property
    def _has_bias(self) -> bool:
        return self._has_qkv_bias or self.config.value_gate_bias

    # Module-level sharded_state_dict, 0.19.2: replace linear_qkv's entries by factories that
    # split them, so that the optimizer's moments are split the same way.
    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Megatron's entries, with `value_gate` apart from `linear_qkv` and no padding.

        Where a plain Transformer's checkpoint is expected (--from-transformer) the gate has none.
        """
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.config.expects_transformer:
            for name, entry in entries.items():
                if name.startswith(f"{prefix}value_gate"):
                    entries[name] = LocalNonpersistentObject(entry.data)
        if self.gate_rows:
            gate = not self.config.expects_transformer
            wanted = {"weight": (True, gate)}
            if self._has_bias:
                wanted["bias"] = (self._has_qkv_bias, self.config.value_gate_bias and gate)
            for name, pieces in wanted.items():
                key = f"{prefix}linear_qkv.{name}"
                entries[key] = self._split_entry(entries[key], pieces, sharded_offsets)
        return entries

    def _split_entry(
        self, whole: ShardedTensor, pieces: tuple[bool, bool], sharded_offsets: tuple
    ) -> Any:
        """Factory for one fused tensor; `pieces`: whether its q/k/v and gate rows are saved."""
        if not any(pieces):
            return LocalNonpersistentObject(whole.data)
        rows, axes = self._row_counts, len(sharded_offsets)
        tp = axes, self.pg_collection.tp.rank(), self.pg_collection.tp.size()
        # What a Transformer's checkpoint lacks stays as it is now: weights only, never moments.
        kept = whole.data if self.config.expects_transformer else None

        @torch.no_grad()
        def build(key: str, fused: Tensor, replica_id: ReplicaId, _: slice | None) -> dict:
            names = key, key.replace("linear_qkv", "value_gate")
            return {
                name: ShardedTensor.from_rank_offsets(
                    name, piece, *sharded_offsets, tp, replica_id=replica_id, prepend_axis_num=axes
                )
                for name, piece, saved in zip(names, fused.split(rows), pieces, strict=False)
                if saved
            }

        @torch.no_grad()
        def merge(loaded: dict) -> Tensor:
            sample = next(iter(loaded.values()))
            fused = sample.new_zeros((sum(rows), *sample.shape[1:]))
            if kept is not None:
                fused.copy_(kept)
            for name, piece in loaded.items():
                start = rows[0] if "value_gate" in name else 0
                fused[start : start + len(piece)] = piece
            return fused

        return ShardedTensorFactory(whole.key, whole.data, build, merge, whole.replica_id)


def _transformer_was_read(attention: SATFormerAttention, _: Any) -> None:
    # All chunks have handed out their entries by now; what is saved from here on has gates.
    attention.config.expect_transformer(False)


def _padding(rows: int) -> int:
    return -rows % ROW_MULTIPLE


def _widened(linear_qkv: Any, gate_rows: int) -> Any:
    """Builder of linear_qkv with room for the gate rows on every tensor-parallel rank."""

    def build(hidden_size: int, qkv_rows: int, *, config: SATFormerConfig, **kwargs: Any) -> Any:
        tp = config.tensor_model_parallel_size
        rows = qkv_rows // tp + gate_rows // tp
        rows += _padding(rows)
        kwargs["bias"] = kwargs["bias"] or config.value_gate_bias
        kwargs["init_method"] = partial(_init_first, kwargs["init_method"], qkv_rows // tp, rows)
        return linear_qkv(hidden_size, rows * tp, config=config, **kwargs)

    return build


@torch.no_grad()
def _init_first(
    init_method: Callable[[Tensor], Any], first: int, rows: int, weight: Tensor
) -> None:
    """Fill the first of every `rows` rows, one rank's, as a weight without the others would be."""
    blocks = weight.view(-1, rows, weight.size(-1))
    alone = weight.new_empty(len(blocks) * first, weight.size(-1))
    init_method(alone)
    weight.zero_()
    blocks[:, :first] = alone.view(len(blocks), first, -1)


_FORMAT = "only torch_dist checkpoints store gates apart"
SATFORMER = Architecture(
    name="satformer",
    mfu=0.234,
    source="arXiv 2605.03953",
    equation=("V'_n = V_n + alpha_n V_1, in layers n that mix\n{config.gate_equation}"),
    about=(
        "V_1 are the values of the first layer. The KV cache holds V', so decoding costs what it "
        "costs a\nplain Transformer. SATFormer is described in arXiv 2605.03953."
    ),
    twin="megatron_satformer.model.reference.satformer:SATFormer",
    exported="megatron_satformer.checkpoint.exported.modeling_satformer:SATFormerForCausalLM",
    config=SATFormerConfig,
    options=SATFormerOptions,
    attention=SATFormerAttention,
    layer=ValueResidualLayer,
    carry=carry_v1,
    defaults=replica_defaults,
    controls=CONTROLS,
    tensors=own_tensors,
    refuses=(
        *REFUSES,
        Row("use_megatron_fsdp use_torch_fsdp2", "its sharding does not know the fused gate rows"),
        Row(
            "tensor_parallel_num_weight_shards qk_clip",
            "it treats the rows of linear_qkv by position, and gate rows are among them",
        ),
        Row("fp8_param_gather", "the fused gate rows cannot be initialised in fp8"),
        Row("fp4_param_gather", "the fused gate rows cannot be initialised in fp4"),
        Row("ckpt_convert_format", _FORMAT),
        Row("ckpt_format", _FORMAT, ("torch_dist",)),
        Row(
            "optimizer",
            "it takes linear_qkv, gate rows included, for one matrix",
            ("adam", "sgd", "lion", "muon", "dist_muon"),
        ),
    ),
    plain_start=why_not_from_zero,
    start_options={"value_gate": "tanh"},
    from_transformer=None,
    gates="alpha [batch, sequence, KV heads] of\neach layer that mixes",
    layers_note=describe_mixing,
    paper=(
        PaperLayout(
            "SATFormer",
            "SATFormerForCausalLM",
            names={r"\.self_attn\.value_gate\.": ".attn.value_residual_mixing.alpha_proj."},
            options={
                "value_gate": "value_residual_gate",
                "value_gate_bias": "value_residual_proj_bias",
                "value_residual_last_k": "value_residual_last_k",
            },
            fixed=lambda options: {"use_value_residual": True},
            refuse=why_not_published,
        ),
    ),
)
