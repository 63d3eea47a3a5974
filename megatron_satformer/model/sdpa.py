"""Core attention of the local backend: torch's scaled_dot_product_attention.

The fast path on CPU, and on a GPU without Transformer Engine. Same interface as Megatron's
DotProductAttention, which `--attention-backend local` still selects. Packed documents, sliding
windows and context parallelism: K and V are gathered over the context-parallel ranks, in one
collective, and every query reads one run of keys: spans.py on the CPU, flex.py on a GPU.

Shapes: s sequence, b micro-batch, np heads, ng KV heads, hn head dim; "/tp": per rank.
"""

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_satformer.model.context import GatherContext
from megatron_satformer.model.packing import PackedDocuments, chunks_of, reach_of, spans_of
from megatron_satformer.model.spans import BLOCK, attend_spans
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
        self.window = window_before(config, layer_number)
        cut = config.context_parallel_size > 1 and pg_collection.cp.size() > 1
        self.cp_group = pg_collection.cp if cut else None

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
            query: [s, b, np/tp, hn]; under context parallelism s / cp, as Megatron cuts it.
            key: [s, b, ng/tp, hn].
            value: [s, b, ng/tp, hn].
            attention_mask: None for causal, else bool, broadcastable to [b, np, s, s], True where
                attention is forbidden (Megatron's convention). None with what follows.
            attn_mask_type: unused; Megatron passes it.
            attention_bias: must be None.
            packed_seq_params: PackedDocuments, or None.

        Returns:
            [s, b, np/tp * hn].
        """
        assert attention_bias is None
        if packed_seq_params is not None or self.window is not None or self.cp_group is not None:
            assert attention_mask is None
            if query.size(0) == key.size(0):
                return self._attend_runs(query, key, value, packed_seq_params).flatten(2)
            assert packed_seq_params is self.cp_group is None, "one document, on one rank"
            assert self.window is not None
            key, value = (t[-1 - self.window :] for t in (key, value))  # of a cache
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

    def _attend_runs(
        self, query: Tensor, key: Tensor, value: Tensor, documents: PackedDocuments | None
    ) -> Tensor:
        """Attention where every query reads one run of keys; [s, b, np/tp, hn]."""
        assert not (self.training and self.dropout), "refused"
        group = self.cp_group
        ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
        chunks = chunks_of(query.size(0), ranks, rank)
        sequence = ranks * query.size(0)
        if not query.is_cuda:
            spans = [*spans_of(chunks, sequence, documents, self.window, BLOCK)]
            return attend_spans(query, key, value, spans, self.window, self.softmax_scale, group)
        from megatron_satformer.model.flex import attend_by_mask, compiled_flex

        if group is not None:
            key, value = GatherContext.apply(torch.stack([key, value]), group).unbind(0)
        mask = self._mask(chunks, sequence, documents, query.device)
        return attend_by_mask(query, key, value, mask, self.softmax_scale, compiled_flex())

    def _mask(
        self, chunks: Any, sequence: int, documents: PackedDocuments | None, device: Any
    ) -> Any:
        """Made once for all layers, and for all steps where it is the same."""
        if documents is None:
            return _mask_without_documents(chunks, sequence, self.window, device)
        from megatron_satformer.model.flex import build_mask

        if self.window not in documents.masks:
            reach = reach_of(chunks, documents, self.window, device)
            documents.masks[self.window] = build_mask(*reach, sequence)
        return documents.masks[self.window]


@lru_cache(maxsize=8)
def _mask_without_documents(chunks: Any, sequence: int, window: int | None, device: Any) -> Any:
    from megatron_satformer.model.flex import build_mask

    return build_mask(*reach_of(chunks, None, window, device), sequence)


def window_before(config: TransformerConfig, layer_number: int) -> int | None:
    """How many keys a query of that layer reads before its own; None: all."""
    size, skip = config.window_size, config.window_attn_skip_freq
    if not is_layer_window_attention(size, skip, layer_number) or size[0] < 0:
        return None
    return size[0]
