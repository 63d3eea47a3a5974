"""What a training step moves and computes at least, operator by operator, against a GPU's roofline.

Computed, not measured: forward and backward run on tensors without memory. An operator takes as
long as the GPU needs to read what it reads and write what it writes, or to compute it, whichever is
longer; nothing stays in a cache, and to start it costs nothing. The optimizer is not in it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megatron_satformer.backend.device import choose_device
from megatron_satformer.benchmark.training import check_heads, configure_model
from megatron_satformer.model import kernels
from megatron_satformer.model.architectures import PLAIN, TABLE
from megatron_satformer.model.variants import find_variants
from megatron_satformer.planning import measure  # noqa: F401 (FLOPs of a CPU's attention)
from megatron_satformer.planning.fake_ranks import Silu, build_chunk, fake_rank
from megatron_satformer.planning.hardware import find_gpu


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is computed, bf16; sizes as Megatron's flags of the same names, by default 1.3B's.

    Attributes:
        gpu: as `planning.hardware` names it.
    """

    architectures: tuple[str, ...] = tuple(TABLE)
    hidden_size: int = 2048
    num_layers: int = 24
    num_attention_heads: int = 32
    num_query_groups: int = 32
    ffn_hidden_size: int = 5632
    seq_length: int = 4096
    micro_batch_size: int = 1
    vocab_size: int = 32000
    gpu: str = "h100"

    def __post_init__(self) -> None:
        find_variants(self.architectures)
        find_gpu(self.gpu)
        check_heads(self)
        if self.num_layers < 2:
            raise ValueError(f"num_layers ({self.num_layers}) must be at least 2. Raise it.")


@dataclass(frozen=True)
class Cost:
    """Of one direction, or of both: bytes read and written, FLOPs of products, least seconds."""

    bytes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.bytes + other.bytes, self.flops + other.flops, self.seconds + other.seconds
        )

    def __sub__(self, other: "Cost") -> "Cost":
        return self + other * -1.0

    def __mul__(self, factor: float) -> "Cost":
        return Cost(self.bytes * factor, self.flops * factor, self.seconds * factor)


WRITE_ALONE = "copy_", "zero_", "fill_"  # they do not read what they write


class Traffic(TorchDispatchMode):
    """Adds up what operators cost while it is active, and what `kernels` are started with."""

    def __init__(self, gpu: str) -> None:
        super().__init__()
        self._cost, self._by_kernels, self._gpu = Cost(), 0.0, find_gpu(gpu)

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        name = operator._schema.name.removeprefix("aten::")
        known = {x.untyped_storage()._cdata for x in inputs}
        is_view = not operator._schema.is_mutable and all(
            x.untyped_storage()._cdata in known for x in outputs
        )
        if is_view or name.startswith(("empty", "new_empty")):
            return result
        if name in WRITE_ALONE:
            inputs = inputs[1:]
        elif name.startswith("new_") or name.endswith("_like"):
            inputs = []
        flops = 0.0
        if (formula := flop_registry.get(operator._overloadpacket)) is not None:
            flops = formula(*args, **(kwargs or {}), out_val=result)
        self._add(sum(map(_bytes, [*inputs, *outputs])), flops)
        return result

    def _add(self, moved: float, flops: float) -> None:
        seconds = max(moved / self._gpu.reads, flops / self._gpu.flops)
        self._cost += Cost(moved, flops, seconds)

    def count_kernel(self, tensors: Any) -> None:
        """One of `kernels` is started, which reads or writes every tensor once."""
        self._by_kernels += sum(_bytes(x) for x in tree_leaves(tensors) if isinstance(x, Tensor))

    def take(self, flops: float | None = None) -> Cost:
        """What has come together since the last time.

        Args:
            flops: of the same without kernels, to which these compute what is missing.
        """
        if self._by_kernels:
            self._add(self._by_kernels, 0.0 if flops is None else flops - self._cost.flops)
        cost, self._cost, self._by_kernels = self._cost, Cost(), 0.0
        return cost


class _Kernels:
    """Instead of `triton_kernels`: any kernel, started on any grid, is counted and does nothing."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    def __getattr__(self, name: str) -> "_Kernels":
        return self

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **sizes: self._traffic.count_kernel(args)


class _Norm(torch.autograd.Function):
    """torch's rms_norm as on a GPU, one operator each way; a CPU takes it apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: list[int], weight: Tensor | None, eps: float) -> Tensor:
        scale = x.new_empty(*x.shape[: -len(shape)], *(1 for _ in shape), dtype=torch.float32)
        ctx.save_for_backward(x, scale, weight)
        ctx.shape = shape
        return torch.empty_like(x).copy_(x)  # as many bytes: there are no values here

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        wanted = [True, weight is not None]
        own = torch.ops.aten._fused_rms_norm_backward(gradient, x, ctx.shape, scale, weight, wanted)
        return own[0], None, own[1], None


def _rms_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _Norm.apply(x, list(shape), weight, eps)


def _bytes(x: Tensor) -> int:
    return min(x.nbytes, x.untyped_storage().nbytes())  # less where it is expanded


@contextmanager
def _as_on_a_gpu(traffic: Traffic) -> Iterator[None]:
    """`kernels` takes all that it would take there, and starts nothing; norms are one operator."""
    norms = patch.object(torch.nn.functional, "rms_norm", _rms_norm)
    with (
        norms,
        patch.multiple(
            kernels,
            DEVICE="cpu",
            _has_triton=lambda: True,
            _kernels=lambda: _Kernels(traffic),
            _table=list,
            _sizes=lambda *_: {},
            _heads=lambda *_: {},
        ),
    ):
        yield


def _cost(options: BenchmarkOptions, architecture: str) -> dict[str, list[Cost]]:
    """Forward and backward of a micro-batch, by what computes it: torch alone, and kernels."""
    found: dict[str, list[Cost]] = {}
    for way in ("torch", "kernels"):
        model = configure_model(options, architecture, "local", bf16=True)
        model.transformer.perform_initialization = False
        model.transformer.activation_func = Silu.apply
        model.transformer.fused_blend = way == "kernels"
        with fake_rank(model.transformer, 0):
            chunk = build_chunk(model, 0, 1)
            ids = torch.zeros(options.micro_batch_size, options.seq_length, dtype=torch.int64)
            known: Sequence[float | None] = [cost.flops for cost in found.get("torch", ())]
            with Traffic(options.gpu) as traffic, _as_on_a_gpu(traffic):
                loss = chunk(ids, ids, None, labels=ids).float().mean()
                forward = traffic.take(*known[:1])
                loss.backward()
                found[way] = [forward, traffic.take(*known[1:])]
    return found


def run_benchmark(options: BenchmarkOptions) -> dict[str, Any]:
    """Compute all architectures.

    Returns:
        Options, the GPU's figures, what a layer of the plain Transformer moves and computes, and
        per architecture, by torch's operators alone and with Triton's kernels: forward, backward
        and both over the Transformer's of the whole model (seconds), and what both add per layer
        over that layer (bytes, FLOPs).
    """
    choose_device("cpu")  # which stands in for any
    gpu = find_gpu(options.gpu)
    plain = _cost(options, PLAIN)["torch"]
    shallow = _cost(replace(options, num_layers=2), PLAIN)["torch"]
    both = plain[0] + plain[1]
    layers = options.num_layers
    layer = (both - shallow[0] - shallow[1]) * (1 / (layers - 2)) if layers > 2 else both * 0.5
    rows = []
    for architecture in options.architectures:
        row: dict[str, Any] = {"architecture": architecture}
        for way, (forward, backward) in _cost(options, architecture).items():
            more = (forward + backward - both) * (1 / layers)
            row[way] = {
                "ms": (forward + backward).seconds * 1e3,
                "step_time_ratio": (forward + backward).seconds / both.seconds,
                "forward_ratio": forward.seconds / plain[0].seconds,
                "backward_ratio": backward.seconds / plain[1].seconds,
                "bytes_more": more.bytes / layer.bytes,
                "flops_more": more.flops / layer.flops,
            }
        rows.append(row)
    return {
        "options": vars(options),
        "gpu": {"name": gpu.name, "flops_per_s": gpu.flops, "bytes_per_s": gpu.reads},
        "layer": {"bytes": layer.bytes, "flops": layer.flops, "ms": layer.seconds * 1e3},
        "computed": rows,
    }


def format_table(figures: dict[str, Any]) -> str:
    """The figures of `run_benchmark` as a table."""
    gpu, layer = figures["gpu"], figures["layer"]
    ways = "torch", "kernels"
    lines = [
        f"computed, not measured: {gpu['name']}, {gpu['flops_per_s'] / 1e12:.0f} TFLOP/s, "
        f"{gpu['bytes_per_s'] / 1e12:.2f} TB/s, bf16; by torch's operators, with Triton's kernels",
        f"a layer of the Transformer, forward and backward: {layer['bytes'] / 1e9:.3f} GB, "
        f"{layer['flops'] / 1e12:.3f} TFLOP, {layer['ms']:.3f} ms at least",
        f"{'':<26}" + "".join(f"{way:>42}" for way in ways),
        f"{'':<26}" + f"{'FLOPs':>9}{'bytes':>9}{'step':>8}{'forward':>8}{'back':>8}" * 2,
    ]
    for row in figures["computed"]:
        cells = (
            f"{row[way]['flops_more']:>+9.2%}{row[way]['bytes_more']:>+9.1%}"
            f"{row[way]['step_time_ratio']:>8.3f}{row[way]['forward_ratio']:>8.3f}"
            f"{row[way]['backward_ratio']:>8.3f}"
            for way in ways
        )
        lines.append(f"{row['architecture']:<26}{''.join(cells)}")
    return "\n".join(lines)
