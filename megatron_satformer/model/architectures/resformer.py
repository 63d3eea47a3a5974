"""ResFormer: V'_n = lambda1_n V_1 + lambda2_n V_n, static (arXiv 2410.17897, in all its forms).

    learnable_plus    lambda1_n = lambda_scale * softmax(lambda_logits)_n over the layers that mix,
                      lambda2_n one scalar per layer, init 0.5
    learnable         both are scalars per layer, init 0.5
    identity          0.5 and 0.5
    sparse            --resformer-lambda and 1, in the last k layers
    svformer          1 and 0: every layer attends to V_1

lambda_logits (init 0) and lambda_scale (init num_layers) belong to the whole model: every pipeline
chunk holds a copy, Megatron sums the copies' gradients over stages. The paper gives one lambda for
its sparse form; that the own value's weight is 1 there is our reading of it. SVFormer
has no W_v behind layer 1 and caches V_1 once; here W_v stays, unused, and so do its parameters.

Shapes: s sequence, b micro-batch, ng KV heads, hn head dim, m mixing layers; "/tp": per rank.
"""

from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any, Literal

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import make_viewless_tensor
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_satformer.model.architectures.layouts import PaperLayout
from megatron_satformer.model.architectures.record import Architecture, OwnTensor
from megatron_satformer.model.architectures.value_residual import (
    REFUSES,
    ValueResidualAttention,
    ValueResidualConfig,
    ValueResidualLayer,
    ValueResidualOptions,
    carry_v1,
    describe_mixing,
    mixes,
)
from megatron_satformer.model.attention import Remade
from megatron_satformer.model.coefficients import head_coefficients, summed_over_heads
from megatron_satformer.unsupported import Row

LAMBDA_INIT = 0.5
SPARSE_LAMBDA = 5.0
PLUS: Literal["learnable_plus"] = "learnable_plus"


@dataclass
class ResFormerOptions(ValueResidualOptions):
    """ResFormer's own options."""

    resformer_form: Literal["learnable_plus", "learnable", "identity", "sparse", "svformer"] = PLUS
    """Which published form of resformer. learnable_plus: lambda1 of all layers by one softmax,
    lambda2 per layer; learnable: both per layer, from 0.5; identity: 0.5 and 0.5; sparse: a fixed
    lambda1 beside V_n, with --value-residual-last-k; svformer: V_1 in place of V_n."""

    resformer_lambda: float | None = None
    """lambda1 of resformer's sparse form. Default: 5, as published."""


@dataclass
class ResFormerConfig(ValueResidualConfig, ResFormerOptions):
    """ValueResidualConfig with static weights of V1."""

    architecture: str = "resformer"

    def __post_init__(self) -> None:
        # Lambdas that are shared by all stages: Megatron sums the gradients of parameters marked
        # `pipeline_parallel` over stages when the config has this attribute.
        self.has_cond_embedder = self.resformer_form == PLUS
        super().__post_init__()

    @classmethod
    def check_options(cls, options: Any, *, num_layers: int, groups: int, tp: int) -> None:
        """As ValueResidualConfig's; the sparse form is told where, and alone has a lambda."""
        super().check_options(options, num_layers=num_layers, groups=groups, tp=tp)
        form, weight = options.resformer_form, options.resformer_lambda
        if form == "sparse" and options.value_residual_last_k is None:
            raise ValueError(
                "resformer_form (sparse) must come with value_residual_last_k: it mixes in the "
                "last layers alone. Add --value-residual-last-k, 3 of 8 layers as published."
            )
        if weight is not None and form != "sparse":
            raise ValueError(
                f"resformer_lambda ({weight}) must come with resformer_form (sparse), not "
                f"resformer_form ({form}). Leave it out."
            )
        if weight is not None and not isfinite(weight):
            raise ValueError(f"resformer_lambda ({weight}) must be finite. Leave it out for 5.")

    @property
    def summary(self) -> str:
        """As ValueResidualConfig's."""
        return super().summary + (f", {self.resformer_form}" if self.resformer_form != PLUS else "")


def fixed_lambdas(options: Any) -> tuple[float, float] | None:
    """Weights of V_1 and V_n that nothing learns; None: they are learned."""
    weight = options.resformer_lambda
    fixed = {
        "identity": (LAMBDA_INIT, LAMBDA_INIT),
        "sparse": (SPARSE_LAMBDA if weight is None else weight, 1.0),
        "svformer": (1.0, 0.0),
    }
    return fixed.get(options.resformer_form)


class ResFormerAttention(ValueResidualAttention):
    """ValueResidualAttention that blends with two scalars per layer."""

    def __init__(
        self,
        config: ResFormerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        self._blended: Remade | None = None
        if self.mixes:
            for tensor in own_tensors(config, layer_number):
                name = tensor.megatron.rpartition(".")[2]
                self.register_parameter(name, head_coefficients(config, LAMBDA_INIT))  # [1]
            # In a tuple, so that the chunk owns the shared parameters and not every layer.
            self._shared: tuple[SharedLambdas, ...] = ()
            self.linear_proj.register_forward_pre_hook(self._forget_blended)

    def blend(self, value: Tensor, v1: Tensor) -> Tensor:
        """lambda1 V1 + lambda2 V. value, v1: [s, b, ng/tp, hn]."""
        lambda1, lambda2 = self._lambdas(value)
        own, first = lambda2.to(value.dtype), lambda1.to(value.dtype)
        if not self.buffer_is_kept(value):
            value = value.contiguous()
        blended = (own * value).addcmul_(first, v1)
        if own.requires_grad and torch.is_grad_enabled() and self.is_local:
            # The gradient of lambda2 reads V. To keep V' as well would be one tensor more.
            with torch.no_grad():
                parts = [tensor.detach() for tensor in (own, value, first, v1)]
            self._blended = Remade(blended, partial(_write_blended, *parts))
        return blended

    # SelfAttention.forward, 0.19.2: a call that fails in attention leaves nothing on the module.
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As SelfAttention's."""
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._blended = None

    def _forget_blended(self, _: Any, inputs: tuple[Tensor, ...]) -> None:
        # What linear_proj reads comes behind attention, recomputed or not.
        remade, self._blended = self._blended, None
        if remade is not None:
            remade.forget(inputs[0])

    def _lambdas(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Of this layer, [1] each."""
        fixed = fixed_lambdas(self.config)
        if fixed is not None:
            return value.new_full((1,), fixed[0]), value.new_full((1,), fixed[1])
        tp = self.pg_collection.tp
        if self.config.resformer_form == PLUS:
            (shared,) = self._shared
            lambda1 = shared(self.layer_number)
        else:
            lambda1 = summed_over_heads(self.value_lambda1, tp)
        return lambda1, summed_over_heads(self.value_lambda2, tp)


def _write_blended(own: Tensor, value: Tensor, first: Tensor, v1: Tensor, out: Tensor) -> None:
    torch.mul(own, value, out=out).addcmul_(first, v1)


class SharedLambdas(MegatronModule):
    """lambda1 of every mixing layer; one copy per pipeline chunk.

    Args:
        config: gives the number of layers and which of them mix.
        tp_group: tensor-parallel group.
        copy: number of the chunk in the model; chunk 0 saves the parameters and counts in the
            gradient norm.
    """

    def __init__(self, config: ResFormerConfig, tp_group: ProcessGroup, copy: int) -> None:
        super().__init__(config)
        self.first = config.num_layers - config.num_mixing_layers + 1  # first layer that mixes
        self.tp_group = tp_group
        self.copy = copy
        self.lambda_logits = head_coefficients(config, [0.0] * config.num_mixing_layers)  # [m]
        self.lambda_scale = head_coefficients(config, float(config.num_layers))  # [1]
        for parameter in self.parameters():
            parameter.pipeline_parallel = True  # gradients summed over stages
            parameter.shared = copy != 0  # counted once in the gradient norm
            # A bucket of its own, so that the distributed optimizer shards it alike on all stages.
            parameter.shared_embedding = True

    def forward(self, layer_number: int) -> Tensor:
        """lambda1 of one layer, [1]."""
        logits = summed_over_heads(self.lambda_logits, self.tp_group).float()
        scale = summed_over_heads(self.lambda_scale, self.tp_group).float()
        return scale * logits.softmax(dim=0)[layer_number - self.first]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """One entry per parameter, saved by the first copy alone."""
        replica = (self.copy, self.tp_group.rank(), (metadata or {})["dp_cp_group"].rank())
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}", parameter, replica_id=replica
            )
            for name, parameter in self.named_parameters()
        }


def attach_shared_lambdas(chunk: Any, place: int) -> None:
    """Give one pipeline chunk its copy of the shared lambdas.

    Every chunk has one, also where no layer mixes: Megatron sums their gradients over all stages.

    Args:
        chunk: a GPTModel, not wrapped yet.
        place: its number in the model; see `SharedLambdas`.
    """
    if chunk.config.resformer_form != PLUS:
        return
    decoder = chunk.decoder
    decoder.value_residual = SharedLambdas(chunk.config, decoder.pg_collection.tp, place)
    mixing = [layer.self_attention for layer in decoder.layers if layer.self_attention.mixes]
    for attention in mixing:
        attention._shared = (decoder.value_residual,)
    if not mixing:
        decoder.register_forward_hook(_use_shared_lambdas)


def _use_shared_lambdas(decoder: Any, _: Any, hidden_states: Tensor) -> Tensor:
    # Overlapped communication of the distributed optimizer waits for every parameter to be used in
    # its module's forward, and to have its gradient.
    lambda1 = decoder.value_residual(decoder.config.num_layers)
    unchanged = _WithoutEffect.apply(hidden_states, lambda1)
    # The schedule frees the output after sending it and refuses views.
    return make_viewless_tensor(unchanged, requires_grad=True, keep_graph=True)


class _WithoutEffect(torch.autograd.Function):
    """The first argument unchanged; the second gets a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, unused: Tensor) -> Tensor:
        ctx.save_for_backward(unused)
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.zeros_like(*ctx.saved_tensors)


def own_tensors(options: Any, n: int) -> list[OwnTensor]:
    """Learned lambdas of layer n; those of the whole model for n = 0."""
    if fixed_lambdas(options) is not None:
        return []
    shared = options.resformer_form == PLUS
    if n == 0:
        if not shared:
            return []
        m = sum(mixes(options, layer) for layer in range(1, options.num_layers + 1))
        sizes = {"lambda_logits": m, "lambda_scale": 1}
        return [
            OwnTensor(f"value_residual.{name}", (f"value_residual.{name}",), (size,), fp32=True)
            for name, size in sizes.items()
        ]
    if not mixes(options, n):
        return []
    names = ("value_lambda2",) if shared else ("value_lambda1", "value_lambda2")
    return [
        OwnTensor(f"self_attention.{name}", (f"self_attn.{name}",), (1,), fp32=True)
        for name in names
    ]


def _defaults(preview: Namespace) -> dict[str, Any]:
    # The shared lambdas have small buckets of their own, of which some data-parallel ranks hold
    # padding alone: Megatron's other format dies of that at the first save.
    return {"dist_ckpt_optim_fully_reshardable": True} if preview.use_distributed_optimizer else {}


def _is_other_there(options: Any) -> str | None:
    if options.resformer_form != PLUS:
        return f"resformer_form ({options.resformer_form}) must be {PLUS}: it has no other there"
    last_k = options.value_residual_last_k
    if last_k is None or last_k >= options.num_layers - 1:
        return None
    return (
        f"value_residual_last_k ({last_k}) must be left out for a ResFormer: the softmax of its "
        "lambdas runs over all layers but the first in the paper's repository, over the layers "
        "that mix in ours"
    )


_FAR = "its lambdas start far from a Transformer's"
RESFORMER = Architecture(
    controls={
        "resformer-identity": {"resformer_form": "identity"},
        "resformer-learnable": {"resformer_form": "learnable"},
        "resformer-sparse": {"resformer_form": "sparse", "value_residual_last_k": 3},
        "svformer": {"resformer_form": "svformer"},
    },
    name="resformer",
    mfu=0.231,
    source="arXiv 2410.17897",
    equation=("V'_n = lambda1_n V_1 + lambda2_n V_n, in layers n that mix\n{config.lambdas}"),
    about=(
        "V_1 are the values of the first layer. The KV cache holds V', so decoding costs what it "
        "costs a\nplain Transformer. ResFormer is described in arXiv 2410.17897."
    ),
    twin="megatron_satformer.model.reference.resformer:ResFormer",
    exported="megatron_satformer.checkpoint.exported.modeling_resformer:ResFormerForCausalLM",
    config=ResFormerConfig,
    options=ResFormerOptions,
    attention=ResFormerAttention,
    layer=ValueResidualLayer,
    carry=carry_v1,
    tensors=own_tensors,
    finish=attach_shared_lambdas,
    refuses=(
        *REFUSES,
        Row(
            "use_megatron_fsdp use_torch_fsdp2",
            "it has not been tried with lambdas that all stages share",
        ),
    ),
    defaults=_defaults,
    plain_start=lambda options: f"{_FAR}.",
    from_transformer=_FAR,
    layers_note=describe_mixing,
    paper=(
        PaperLayout(
            "ResFormer",
            "ResFormerForCausalLM",
            names={
                r"model\.value_residual\.": "model.lambda_manager.",
                r"\.self_attn\.value_lambda2": ".attn.value_residual_mixing.lambda2",
            },
            shapes=lambda options: {"value_lambda2": (), "lambda_scale": ()},
            options={"value_residual_last_k": "value_residual_last_k"},
            fixed=lambda options: {"use_value_residual": True},
            refuse=_is_other_there,
        ),
    ),
)
