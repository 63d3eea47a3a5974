"""One micro-batch forward and backward through one chunk, counted: bytes, FLOPs, messages.

Everything is counted where torch dispatches operators: an architecture need declare nothing. Works
on fake tensors and on real ones. Must not know: layouts, GPUs.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

from megatron_satformer.parallel.carry import boundary_width

aten = torch.ops.aten


class Message(NamedTuple):
    """A collective: what it is, over how many ranks, and bytes of its whole tensor."""

    kind: str
    ranks: int
    bytes: int


@dataclass
class Footprint:
    """What one micro-batch does in one chunk, on one rank.

    Attributes:
        parameters: numbers that the rank holds of it, by whether experts share them out.
        received: bytes of the tensor that comes in.
        sent: bytes of the tensor that goes out.
        kept: bytes between its forward and its backward, `received` included.
        forward, backward: most bytes at once in either, its own `kept` included.
        forward_flops: of matrix products and attention, the latter as causal.
        backward_flops: likewise; twice those of forward, and what is recomputed.
        messages: collectives between tensor-parallel, context-parallel and expert-parallel ranks.
    """

    parameters: int
    expert_parameters: int
    received: int = 0
    sent: int = 0
    kept: int = 0
    forward: int = 0
    backward: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    messages: Counter[Message] = field(default_factory=Counter)

    @property
    def recomputed_flops(self) -> int:
        """What backward computes again."""
        return self.backward_flops - 2 * self.forward_flops


class Ledger(TorchDispatchMode):
    """Bytes of all storages that operators make while it is active, their FLOPs, what they send."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = self.flops = 0
        self.messages: Counter[Message] = Counter()
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = str(operator).rsplit(".", 1)[0]
        if name.startswith("c10d."):
            self._count_message(name.removeprefix("c10d."), args)
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        if (formula := flop_registry.get(operator._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage from now until nobody holds it."""
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def ignore(self, tensors: Any) -> None:
        """Never counts the storages of these: they are there already."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """Gives a list, which then holds the most bytes at once in here."""
        found: list[int] = []
        self.most = self.alive
        yield found
        found.append(self.most)

    def _count_message(self, kind: str, args: tuple) -> None:
        (group,) = (
            arg
            for arg in args
            if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())
        )
        ranks = torch.distributed.ProcessGroup.unbox(group).size()
        tensors = [t for arg in args for t in tree_leaves(arg) if isinstance(t, torch.Tensor)]
        if ranks > 1:
            self.messages[Message(kind, ranks, max(t.nbytes for t in tensors))] += 1


def count_parameters(chunk: GPTModel) -> tuple[int, int]:
    """Numbers that a rank holds of a chunk: those every data-parallel rank has, and experts'."""
    counts = [0, 0]
    for parameter in chunk.parameters():
        counts[not getattr(parameter, "allreduce", True)] += parameter.numel()
    return counts[0], counts[1]


def measure(chunk: GPTModel, batch: int, sequence: int, layers: range, last: bool) -> Footprint:
    """Runs one micro-batch through a chunk, as Megatron's schedules do.

    Args:
        chunk: its model.
        batch: samples of a micro-batch.
        sequence: tokens of one that this rank holds: s / cp.
        layers: numbers of its layers.
        last: whether the loss is in it.
    """
    found = Footprint(*count_parameters(chunk))
    config = chunk.config
    for parameter in chunk.parameters():
        # Gradients are added to a buffer, which is counted elsewhere, and dropped.
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    with Ledger() as ledger:
        ledger.ignore([*chunk.parameters(), *chunk.buffers()])
        if not chunk.pre_process:
            received = _receive(config, batch, sequence, layers)
            found.received = received.nbytes
            chunk.set_input_tensor(received)
        with ledger.peak() as forward:
            ids = torch.zeros(batch, sequence, dtype=torch.int64)
            output = chunk(ids, ids, None, labels=ids if last else None)
            output = output.float().sum() if last else output
            del ids
        shape, dtype = output.shape, output.dtype
        found.sent = 0 if last else output.nbytes
        deallocate_output_tensor(output, not last and config.deallocate_pipeline_outputs)
        found.kept, found.forward_flops = ledger.alive, ledger.flops
        with ledger.peak() as backward:
            if last:
                output.backward()
            else:
                custom_backward(output, torch.empty(shape, dtype=dtype))
    found.forward, found.backward = forward[0], backward[0]
    found.backward_flops = ledger.flops - found.forward_flops
    found.messages = ledger.messages
    return found


def _receive(config: Any, batch: int, sequence: int, layers: range) -> torch.Tensor:
    rows = sequence // (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    shape = rows, batch, boundary_width(config, layers.start - 1)
    return torch.empty(shape, dtype=config.pipeline_dtype, requires_grad=True)


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _products(query: Any, key: Any, value: Any, is_causal: bool) -> int:
    """Of two products over [b, n, s, hn]; causal attention needs half: benchmark.utilization."""
    whole = 2 * prod((*query[:3], key[-2], query[-1] + value[-1]))
    return whole // 2 if is_causal else whole


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
def _attention(
    query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False, **_: Any
) -> int:
    return _products(query, key, value, is_causal)


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward(
    gradient: Any, query: Any, key: Any, value: Any, *more: Any, **_: Any
) -> int:
    return 2 * _products(query, key, value, more[-1])  # output, log-sum-exp, dropout, is_causal
