"""LIMe for Hugging Face transformers (arXiv 2502.09245).

    [K; V]_n     = W_kv,n x_n
    [K'; V']_n,g = sum_l sum_j R_n[g, l, j] [K; V]_l,j  over layers l <= n and KV heads j

for layers n >= 2 (1-based). QK-norm and RoPE come after. K' and V' are what attention reads and
what the cache holds: K_l and V_l of the tokens at hand are all that a sum needs, so the cache is
that of a plain Transformer.

Shapes: b batch, s sequence, ng KV heads, hn head dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_lime import LIMeConfig
from .modeling_access import LearnedAccess, number_names
from .modeling_decoder import (
    SPLIT_HEADS,
    DecoderAttention,
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderModel,
    DecoderPreTrainedModel,
)


class LIMeAttention(DecoderAttention):
    """Attention that reads sums of the keys and values of all heads of all layers so far."""

    def __init__(self, config: LIMeConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if layer_idx:
            ng = config.num_key_value_heads
            self.lime_router = nn.Parameter(torch.empty(ng, layer_idx + 1, ng))
            names = [f"K, V of {n + 1}" for n in range(layer_idx + 1) for _ in range(ng)]
            self.access = LearnedAccess(names, number_names(ng))

    def mix(
        self, hidden_states: Tensor, k: Tensor, v: Tensor, carried: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor | None]:
        """The equation; what is carried are K_1, V_1, K_2 .. [b, s, ng, hn] each."""
        carried = (*self.expect(carried, 2 * self.layer_idx), k, v)
        if self.layer_idx:
            if v.size(-2) < self.config.num_key_value_heads:
                raise NotImplementedError(SPLIT_HEADS.format("the router of a LIMe"))
            router = self.access(self.lime_router.float().flatten(1))
            router = router.unflatten(1, self.lime_router.shape[1:])
            k, v = self._route(router, carried[0::2]), self._route(router, carried[1::2])
        return k, v, carried, None

    @staticmethod
    def _route(router: Tensor, history: Sequence[Tensor]) -> Tensor:
        """Sums of tensors [b, s, ng, hn] by weights [ng, n, ng], in float32 -> the same shape."""
        pairs = zip(router.unbind(1), history, strict=True)
        first, *others = (torch.einsum("gj,bsjd->bsgd", r, x.float()) for r, x in pairs)
        return sum(others, first).to(history[0].dtype)


class LIMePreTrainedModel(DecoderPreTrainedModel):
    """What the models share: initialisation, the own layer read head by head, others at random."""

    config_class = LIMeConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LIMeAttention) and module.layer_idx:
            router = module.lime_router
            bound = (3 / router[0].numel()) ** 0.5
            start = torch.empty_like(router).uniform_(-bound, bound)
            start[:, -1] = torch.eye(len(router))
            init.copy_(router, start)


class LIMeModel(LIMePreTrainedModel, DecoderModel):
    """DecoderModel whose layers hand on all keys and values made so far."""

    attention_class = LIMeAttention


class LIMeForCausalLM(LIMePreTrainedModel, DecoderForCausalLM):
    """LIMeModel with its language-model head."""

    model_class = LIMeModel


class LIMeForSequenceClassification(LIMePreTrainedModel, DecoderForSequenceClassification):
    """LIMeModel with a score per label."""

    model_class = LIMeModel


__all__ = [
    "LIMeForCausalLM",
    "LIMeForSequenceClassification",
    "LIMeModel",
    "LIMePreTrainedModel",
]
