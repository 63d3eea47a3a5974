"""Gated value embeddings for Hugging Face transformers (nanochat).

    V'_n = V_n + 3 sigma(W_g,n x_n[:12]) E_n[token]

in every other layer n, the last one among them, x_n the normed input of attention. V' is what
attention reads and what the cache holds: the cache is that of a plain Transformer.

Shapes: b batch, s sequence, ng KV heads, hn head dim.
"""

from math import sqrt

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_value_embeddings import ValueEmbeddingsConfig
from .modeling_access import LearnedAccess, number_names
from .modeling_decoder import (
    SPLIT_HEADS,
    DecoderAttention,
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderModel,
    DecoderPreTrainedModel,
)


class ValueEmbeddingsAttention(DecoderAttention):
    """Attention whose values read a table at the token, through one gate per token and KV head."""

    def __init__(self, config: ValueEmbeddingsConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.has_table = layer_idx in config.mixing_layers
        if self.has_table:
            ng, channels = config.num_key_value_heads, min(12, config.hidden_size)
            self.value_embedding = nn.Embedding(config.vocab_size, ng * self.head_dim)
            self.value_embedding_gate = nn.Linear(channels, ng, bias=False)
            self.access = LearnedAccess(["table"], number_names(ng), gate=True)

    def mix(
        self, hidden_states: Tensor, k: Tensor, v: Tensor, carried: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor | None]:
        """The equation; what is carried are the token ids [b, s], the gates [b, s, ng]."""
        if not self.has_table:
            return k, v, carried, None
        (ids,) = self.expect(carried, 1)
        if v.size(-2) < self.config.num_key_value_heads:
            raise NotImplementedError(SPLIT_HEADS.format("a table of value embeddings"))
        read = self.value_embedding(ids).unflatten(-1, v.shape[2:])
        gate = 3 * torch.sigmoid(self.value_embedding_gate(hidden_states[..., :12]))
        gate = self.access(gate.unsqueeze(-1))
        return k, torch.addcmul(v, gate, read), carried, gate.squeeze(-1)


class ValueEmbeddingsPreTrainedModel(DecoderPreTrainedModel):
    """What the models share: initialisation."""

    config_class = ValueEmbeddingsConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ValueEmbeddingsAttention) and module.has_table:
            bound = sqrt(3 / self.config.hidden_size)
            init.uniform_(module.value_embedding.weight, -bound, bound)
            init.uniform_(module.value_embedding_gate.weight, 0.0, 0.02)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """As transformers', of the tables of values too: a new token has a row in each."""
        words = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        for module in self.modules():
            if isinstance(module, ValueEmbeddingsAttention) and module.has_table:
                module.value_embedding = self._get_resized_embeddings(
                    module.value_embedding, words.num_embeddings, mean_resizing=mean_resizing
                )
        return words


class ValueEmbeddingsModel(ValueEmbeddingsPreTrainedModel, DecoderModel):
    """DecoderModel whose layers get the token ids."""

    attention_class = ValueEmbeddingsAttention

    def start(self, input_ids: Tensor | None) -> tuple[Tensor, ...]:
        """The token ids, [b, s].

        Raises:
            ValueError: Embeddings were given in their place.
        """
        if input_ids is None:
            raise ValueError(
                "inputs_embeds (given) must not take the place of input_ids (None): the tables of "
                "values are read at the ids. Give input_ids."
            )
        return (input_ids,)


class ValueEmbeddingsForCausalLM(ValueEmbeddingsPreTrainedModel, DecoderForCausalLM):
    """ValueEmbeddingsModel with its language-model head."""

    model_class = ValueEmbeddingsModel


class ValueEmbeddingsForSequenceClassification(
    ValueEmbeddingsPreTrainedModel, DecoderForSequenceClassification
):
    """ValueEmbeddingsModel with a score per label."""

    model_class = ValueEmbeddingsModel


__all__ = [
    "ValueEmbeddingsForCausalLM",
    "ValueEmbeddingsForSequenceClassification",
    "ValueEmbeddingsModel",
    "ValueEmbeddingsPreTrainedModel",
]
