"""TransformerLayer that threads V1 from layer to layer through Megatron's `context`.

A decoder has no cross-attention, so `context` is free; TransformerBlock already hands it from
layer to layer and makes it an input of every recomputed function. Must not know: stages.
"""

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class ValueResidualLayer(TransformerLayer):
    """TransformerLayer over a ValueResidualAttention."""

    # TransformerLayer._forward_attention, 0.19.2: it does not hand `context` to self-attention.
    def _forward_attention(
        self, hidden_states: Tensor, *args: Any, context: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Attention half of the layer.

        Args:
            hidden_states: [s, b, h] ([s/tp, b, h] under sequence parallelism).
            *args: as Megatron's.
            context: V1 [s, b, ng/tp, hn], None in layer 1.
            **kwargs: as Megatron's.

        Returns:
            hidden_states as given, and V1 for the next layer.
        """
        with self.self_attention.holding(context) as attention:
            hidden_states, _ = super()._forward_attention(hidden_states, *args, **kwargs)
            return hidden_states, attention.v1
