"""ResFormer for Hugging Face transformers, in all its forms (arXiv 2410.17897).

Of the layers n that mix::

    V'_n    = lambda1_n * V_1 + lambda2_n * V_n
    lambda1 = lambda_scale * softmax(lambda_logits)      learnable_plus; else scalars, or fixed

V' is what attention reads and what the cache holds: the cache is that of a plain Transformer. The
lambdas have the dtype of the other weights, or FSDP2 could not shard a layer; what is computed from
them is float32. A file may hold them in float32: loading the model in bf16 rounds them.

Shapes: b batch, s sequence, h hidden, ng KV heads, hn head dim, m mixing layers.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_resformer import ResFormerConfig
from .modeling_access import LearnedAccess
from .modeling_decoder import (
    SPLIT_HEADS,
    DecoderAttention,
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderModel,
    DecoderPreTrainedModel,
)


class ResFormerValueResidual(nn.Module):
    """The weights of V1, shared by the mixing layers through one softmax."""

    def __init__(self, config: ResFormerConfig) -> None:
        super().__init__()
        self.lambda_logits = nn.Parameter(torch.zeros(len(config.mixing_layers)))
        self.lambda_scale = nn.Parameter(torch.full((1,), float(config.num_hidden_layers)))

    def forward(self) -> Tensor:
        """Returns lambda1 [m] in float32; at init all are L / m."""
        return self.lambda_scale.float() * self.lambda_logits.float().softmax(-1)


class ResFormerAttention(DecoderAttention):
    """Attention whose values are a weighted sum of V1 and their own."""

    def __init__(self, config: ResFormerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mixes = layer_idx in config.mixing_layers
        self.mixing_idx = layer_idx - config.mixing_layers.start
        self.shared = int(config.resformer_form == "learnable_plus")
        if self.mixes:
            self.access = LearnedAccess(["V1", "own V"])
        if self.mixes and config.fixed_lambdas is None:
            if not self.shared:
                self.value_lambda1 = nn.Parameter(torch.full((1,), 0.5))
            self.value_lambda2 = nn.Parameter(torch.full((1,), 0.5))

    def mix(
        self, hidden_states: Tensor, k: Tensor, v: Tensor, carried: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor | None]:
        """The equation; carried: lambda1 [m] if shared, and behind layer 1 V1 [b, s, ng, hn]."""
        if not self.layer_idx:
            return k, v, (*self.expect(carried, self.shared), v), None
        *shared, v1 = self.expect(carried, self.shared + 1)
        if not self.mixes:
            return k, v, carried, None
        lambdas = self.config.fixed_lambdas or self._learned_lambdas(v, *shared)
        lambda1, lambda2 = self.access(lambdas)
        return k, (lambda1 * v1 + lambda2 * v).to(v.dtype), carried, None

    def _learned_lambdas(self, v: Tensor, *shared: Tensor) -> tuple[Tensor, Tensor]:
        if self.training and v.size(-2) < self.config.num_key_value_heads:
            # each rank would have its heads' part of the gradient
            raise NotImplementedError(SPLIT_HEADS.format("training a ResFormer"))
        lambda1 = shared[0][self.mixing_idx] if shared else self.value_lambda1.float()
        return lambda1, self.value_lambda2.float()


class ResFormerPreTrainedModel(DecoderPreTrainedModel):
    """What the models share: initialisation."""

    config_class = ResFormerConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ResFormerAttention):
            for name, parameter in module.named_parameters(recurse=False):
                if name.startswith("value_lambda"):
                    init.constant_(parameter, 0.5)
        elif isinstance(module, ResFormerValueResidual):
            init.zeros_(module.lambda_logits)
            init.constant_(module.lambda_scale, float(self.config.num_hidden_layers))


class ResFormerModel(ResFormerPreTrainedModel, DecoderModel):
    """DecoderModel with lambdas, those of V_1 shared by all layers in learnable_plus."""

    attention_class = ResFormerAttention

    def __init__(self, config: ResFormerConfig) -> None:
        super().__init__(config)
        self.shares = config.resformer_form == "learnable_plus"
        if self.shares:
            self.value_residual = ResFormerValueResidual(config)
            self.post_init()

    def start(self, input_ids: Tensor | None) -> tuple[Tensor, ...]:
        """lambda1 of all layers that mix, [m], if they share them."""
        return (self.value_residual(),) if self.shares else ()


class ResFormerForCausalLM(ResFormerPreTrainedModel, DecoderForCausalLM):
    """ResFormerModel with its language-model head."""

    model_class = ResFormerModel


class ResFormerForSequenceClassification(
    ResFormerPreTrainedModel, DecoderForSequenceClassification
):
    """ResFormerModel with a score per label."""

    model_class = ResFormerModel


__all__ = [
    "ResFormerForCausalLM",
    "ResFormerForSequenceClassification",
    "ResFormerModel",
    "ResFormerPreTrainedModel",
]
