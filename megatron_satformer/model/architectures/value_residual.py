"""Self-attention whose values may read V1, the value projection of layer 1.

Megatron's SelfAttention does everything; this file only hands V1 in and out of one call and lets
an architecture blend it into V before attention and KV cache see V. Must not know: pipeline
stages, gates.

Shapes: s sequence, b micro-batch, ng KV heads, hn head dim; "/tp" marks what a rank holds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_satformer.config import SATFormerConfig


class ValueResidualAttention(SelfAttention):
    """SelfAttention that makes V1 in layer 1 and blends it into V in the layers that mix.

    An architecture subclasses it and implements `blend`.
    """

    config: SATFormerConfig

    def __init__(
        self, config: SATFormerConfig, submodules: Any, layer_number: int, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        self.makes_v1 = layer_number == 1
        self.mixes = config.mixes(layer_number)
        self._v1: Tensor | None = None

    def blend(self, value: Tensor, v1: Tensor) -> Tensor:
        """V' from V and V1, all [s, b, ng/tp, hn]."""
        raise NotImplementedError

    @contextmanager
    def holding(self, v1: Tensor | None) -> Iterator["ValueResidualAttention"]:
        """Hold V1 for the duration of one call; `self.v1` is what the next layer gets.

        Nothing stays on the module afterwards, so no memory is held and a recomputed or
        interleaved micro-batch meets its own V1 only.
        """
        self._v1 = v1
        try:
            yield self
        finally:
            self._v1 = None

    @property
    def v1(self) -> Tensor:
        """V1 [s, b, ng/tp, hn] inside `holding`."""
        assert self._v1 is not None, f"layer {self.layer_number} was not handed V1"
        return self._v1

    # SelfAttention.get_query_key_value_tensors, 0.19.2: the narrowest place where V is whole and
    # neither attention, RoPE nor the KV cache has seen it.
    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """As SelfAttention's, V blended; layer 1 keeps V as V1."""
        query, key, value, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        if self.makes_v1:
            # One contiguous copy feeds both layer 1's attention and the carry: a slice would
            # keep layer 1's whole QKV buffer alive until the last backward.
            self._v1 = value = value.contiguous()
        elif self.mixes:
            value = self.blend(value, self.v1)
        return query, key, value, *rest
