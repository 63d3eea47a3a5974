"""Core attention of the local backend: torch's scaled_dot_product_attention.

The fast path on CPU, and on a GPU without Transformer Engine. Same interface as Megatron's
DotProductAttention, which `--attention-backend local` still selects.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_satformer.unsupported import SDPA, refuse_unsupported


class ScaledDotProductAttention(torch.nn.Module):
    """Causal attention through torch.nn.functional.scaled_dot_product_attention.

    Raises:
        NotImplementedError: an option that this kernel does not have.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        refuse_unsupported(config, SDPA)
        self.config = config
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Causal attention.

        Args:
            query: [s, b, np/tp, hn].
            key: [s, b, ng/tp, hn].
            value: [s, b, ng/tp, hn].
            attention_mask: None for causal, else bool, broadcastable to [b, np, s, s], True where
                attention is forbidden (Megatron's convention).
            attn_mask_type: unused; Megatron passes it.
            attention_bias: must be None.
            packed_seq_params: must be None (packed documents need Transformer Engine).

        Returns:
            [s, b, np/tp * hn].
        """
        assert packed_seq_params is None
        assert attention_bias is None
        assert query.size(0) in (1, key.size(0)), "causal attention over a partial cache"
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [b, n, s, hn]
        dropout = self.dropout if self.training else 0.0
        # Under sequence parallelism the whole block already runs on the forked generator.
        fork = dropout and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if fork else nullcontext():
            context = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=None if attention_mask is None else ~attention_mask,
                is_causal=attention_mask is None and query.size(2) > 1,
                dropout_p=dropout,
                scale=self.softmax_scale,
                enable_gqa=query.size(1) != key.size(1),
            )
        return context.permute(2, 0, 1, 3).flatten(2)  # [s, b, np/tp * hn]
