"""Gated value embeddings in torch alone (nanochat).

    V'_n = V_n + 3 sigma(W_g,n x_n[:12]) E_n[token]

in every other layer n, the last one among them, x_n the normed input of attention.

Shapes: b batch, s sequence, ng KV heads, hn head dim.
"""

import torch
from torch import Tensor, nn

from megatron_satformer.model.reference.decoder import (
    Attention,
    Carried,
    Decoder,
    Shown,
    TwinConfig,
)


class TabledAttention(Attention):
    """Attention whose values read a table at the token, through one gate per token and KV head."""

    def __init__(self, config: TwinConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.has_table = (config.num_hidden_layers - 1 - layer) % 2 == 0
        if self.has_table:
            ng = config.num_key_value_heads
            self.value_embedding = nn.Embedding(config.vocab_size, ng * config.head_dim)
            self.value_embedding_gate = nn.Linear(min(12, config.hidden_size), ng, bias=False)

    def mix(
        self, x: Tensor, k: Tensor, v: Tensor, carried: Carried
    ) -> tuple[Tensor, Tensor, Carried, Shown]:
        """The equation; what is carried are the token ids [b, s], what is shown the gates."""
        if not self.has_table:
            return k, v, carried, None
        (ids,) = carried
        read = self.value_embedding(ids).unflatten(-1, v.shape[2:])  # [b, s, ng, hn]
        gate = 3 * torch.sigmoid(self.value_embedding_gate(x[..., :12]))  # [b, s, ng]
        return k, v + gate[..., None] * read, carried, gate


class ValueEmbeddings(Decoder):
    """The plain twin of --architecture value_embeddings."""

    attention_class = TabledAttention

    def start(self, input_ids: Tensor) -> Carried:
        """The token ids, [b, s]."""
        return (input_ids,)
