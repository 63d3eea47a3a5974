"""SelfAttention that holds no more of linear_qkv's output until backward than it needs.

Queries, keys and values are views of that one buffer. Where a norm of queries or keys keeps what it
reads, the buffer lives on, and V costs nothing in it; where none does, V alone would hold it.
Must not know: architectures.

Shapes: s sequence, b micro-batch, ng KV heads, hn head dim; "/tp" marks what a rank holds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.transformer import attention as megatrons
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


class Fused:
    """What a linear_qkv with rows of its own behind q, k and v returns, until it is split.

    SelfAttention (0.19.2) views and splits q, k and v in two steps of autograd, whose gradients
    would be put together, and then once more with those of the other rows. Here it is one step.

    Args:
        rows: [s, b, q/k/v rows | others | padding].
        counts: of these three.
        keep: takes the other rows, once split.
    """

    def __init__(self, rows: Tensor, counts: Sequence[int], keep: Callable[[Tensor], None]) -> None:
        self._rows, self._counts, self._keep = rows, counts, keep

    def size(self) -> torch.Size:
        """Of q, k and v alone."""
        return torch.Size((*self._rows.shape[:-1], self._counts[0]))

    def view(self, *shape: int) -> "Fused":
        """As a tensor's."""
        self._shape = shape
        return self

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch.split, which is all that is asked of it."""
        assert function is torch.split, function
        fused, sizes = args
        assert kwargs == {"dim": 3}
        *parts, others = _Split.apply(fused._rows, fused._counts, fused._shape, sizes)
        fused._keep(others)
        return tuple(parts)

    @staticmethod
    def is_split_by_torch() -> bool:
        """Whether Megatron leaves the split to torch: Transformer Engine has one of its own."""
        return megatrons.SplitAlongDim is None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, counts: Sequence[int], shape: Sequence[int], sizes: Sequence[int]
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.counts, ctx.shape, ctx.sizes, ctx.whole = counts, shape, sizes, rows.shape
        return _parts(rows, counts, shape, sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        known = next(gradient for gradient in gradients if gradient is not None)
        whole = known.new_empty(ctx.whole)
        parts = _parts(whole, ctx.counts, ctx.shape, ctx.sizes)
        for part, gradient in zip(parts, gradients, strict=True):
            part.zero_() if gradient is None else part.copy_(gradient)
        whole[..., sum(ctx.counts[:2]) :] = 0
        return whole, None, None, None


def _parts(
    rows: Tensor, counts: Sequence[int], shape: Sequence[int], sizes: Sequence[int]
) -> tuple[Tensor, ...]:
    qkv, others, _ = rows.split([*counts], dim=-1)
    return *qkv.view(*shape).split([*sizes], dim=3), others


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
