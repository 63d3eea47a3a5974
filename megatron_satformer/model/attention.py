"""SelfAttention that holds no more of linear_qkv's output until backward than it needs.

Queries, keys and values are views of that one buffer. Where a norm of queries or keys keeps what it
reads, the buffer lives on, and V costs nothing in it; where none does, V alone would hold it.
Must not know: architectures.

Shapes: s sequence, b micro-batch, ng KV heads, hn head dim; "/tp" marks what a rank holds.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_satformer.model.sdpa import ScaledDotProductAttention


class DecoderAttention(SelfAttention):
    """SelfAttention whose V is a copy where it would otherwise hold the buffer alone."""

    @property
    def is_local(self) -> bool:
        """Whether its modules are the local backend's, and its attention reads V of any strides.

        Transformer Engine's are left alone, and Megatron's own attention wants whole rows.
        """
        return isinstance(self.core_attention, ScaledDotProductAttention)

    # SelfAttention.get_query_key_value_tensors, 0.19.2: the narrowest place where V is whole and
    # neither attention, RoPE nor the KV cache has seen it.
    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """As SelfAttention's, V as attention is to read it."""
        query, key, value, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        return query, key, self.finish_value(value), *rest

    def finish_value(self, value: Tensor) -> Tensor:
        """What attention reads as V. value: [s, b, ng/tp, hn], a view of the buffer."""
        return value if self.buffer_is_kept(value) else value.contiguous()

    def buffer_is_kept(self, value: Tensor) -> bool:
        """Whether the buffer lives until backward whatever becomes of V.

        Found out once by asking the norms that there are: it depends on their kernels. So it does
        without gradients, for copies would be of no use, and under Transformer Engine, which is
        left to do what it does.
        """
        if not torch.is_grad_enabled() or not self.is_local:
            return True
        if self._kept is None:
            norms = (self.q_layernorm, self.k_layernorm)
            self._kept = any(_keeps_input(norm, value) for norm in norms if norm is not None)
        return self._kept

    _kept: bool | None = None


def _keeps_input(norm: torch.nn.Module, value: Tensor) -> bool:
    """Whether the norm of a strided view like `value` saves that view."""
    buffer = value.new_zeros(1, 1, 1, 2 * value.size(-1)).requires_grad_()
    storage = buffer.untyped_storage()._cdata
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        norm(buffer[..., : value.size(-1)])
    return any(tensor.untyped_storage()._cdata == storage for tensor in saved)


class Remade:
    """A tensor that gives its memory back after forward and is made again before backward reads it.

    Args:
        tensor: what autograd has saved, or will have; nothing else may read it after `forget`.
        make: writes the same values into the tensor that it is called with, without gradients.
    """

    def __init__(self, tensor: Tensor, make: Callable[[Tensor], Any]) -> None:
        # `data` is the same memory, with a version of its own: autograd takes no offence.
        self._made: tuple[Tensor, Callable[[Tensor], Any]] | None = (tensor.data, make)

    def forget(self, until: Tensor) -> None:
        """Give the memory back until the gradient of `until`, made from the tensor, is there."""
        if self._made is None or not until.requires_grad:
            return
        storage = self._made[0].untyped_storage()
        self._size = storage.nbytes()
        storage.resize_(0)
        until.register_hook(self._restore)

    @torch.no_grad()
    def _restore(self, _: Tensor) -> None:
        if self._made is not None:
            tensor, make = self._made
            self._made = None  # the graph, which owns this hook, outlives its nodes' tensors
            tensor.untyped_storage().resize_(self._size)
            make(tensor)
