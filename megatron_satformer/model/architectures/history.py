"""Attention that reads keys and values of earlier layers, and the layer that hands them to it.

What LIMe and Depth-Attention share. Must not know: which layers read what, pipeline stages.

Shapes: s sequence, b micro-batch, ng KV heads, hn head dim; "/tp" marks what a rank holds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_satformer.model.architectures.extended import ExtendedLayer


class HistoryAttention(SelfAttention):
    """SelfAttention that holds keys and values of earlier layers for one call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._history: tuple[Tensor, ...] | None = None

    @contextmanager
    def holding(self, history: tuple[Tensor, ...]) -> Iterator[Self]:
        """Hold K and V of earlier layers for one call; then `self.history` has this layer's too.

        Nothing stays on the module afterwards, so no memory is held and a recomputed or
        interleaved micro-batch meets its own history only.
        """
        self._history = history
        try:
            yield self
        finally:
            self._history = None

    @property
    def history(self) -> tuple[Tensor, ...]:
        """K and V of the first layer that is read, of the second and so on, inside `holding`."""
        assert self._history is not None, f"layer {self.layer_number} was not handed its history"
        return self._history


class HistoryLayer(ExtendedLayer):
    """ExtendedLayer over a HistoryAttention; `context` are K and V of earlier layers."""

    # TransformerLayer._forward_attention, 0.19.2: it does not hand `context` to self-attention.
    def _forward_attention(
        self,
        hidden_states: Tensor,
        *args: Any,
        context: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Attention half of the layer.

        Args:
            hidden_states: [s, b, h] ([s/tp, b, h] under sequence parallelism).
            *args: as Megatron's.
            context: K and V [s, b, ng/tp, hn] of earlier layers; None in layer 1.
            **kwargs: as Megatron's.

        Returns:
            hidden_states as given, and what the next layer gets.
        """
        with self.self_attention.holding(context or ()) as attention:
            hidden_states, _ = super()._forward_attention(hidden_states, *args, **kwargs)
            return hidden_states, attention.history
