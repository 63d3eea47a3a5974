"""Training steps of architectures at one shape, side by side on one device.

One process steps A, B, C, A, B, C, ... so that all meet the same machine; a ratio of times is the
median over all turns of one to A's turn in the same round. The update is Megatron's own: its
gradient buffers, clipping and Adam. Memory
differs from process to process by some percent; what autograd keeps is counted, to the byte. Peak
memory is taken per architecture: on a GPU from the allocator, on the CPU as the peak resident set
of a process of its own, above what it held before the model was built.
"""

import gc
import os
import statistics
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from megatron_satformer.backend.device import choose_device
from megatron_satformer.backend.process_memory import resident
from megatron_satformer.benchmark.fresh_process import measure_in_own_process
from megatron_satformer.benchmark.operators import largest_differences, seconds_by_operator
from megatron_satformer.benchmark.saved import bytes_saved
from megatron_satformer.benchmark.utilization import count_training_flops, peak_flops
from megatron_satformer.config import DecoderOptions
from megatron_satformer.model.architectures import PLAIN, find_architecture
from megatron_satformer.model.variants import find_variants

MEMORY_STEPS = 3
PARTS = "step_time", "forward", "backward", "optimizer"
Step = tuple[float, ...]
"""Seconds of each of `PARTS`."""


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is measured; sizes as Megatron's flags of the same names.

    Attributes:
        operators: how many of those that make the most difference to the first, of each; 0: none.
    """

    architectures: tuple[str, ...] = (PLAIN, DecoderOptions.architecture)
    hidden_size: int = 256
    num_layers: int = 8
    num_attention_heads: int = 4
    num_query_groups: int = 4
    ffn_hidden_size: int = 1024
    seq_length: int = 512
    micro_batch_size: int = 4
    vocab_size: int = 4096
    rounds: int = 10
    steps: int = 3
    processes: int = 1
    operators: int = 0
    bf16: bool = False
    device: str = "auto"
    transformer_impl: str = "auto"

    def __post_init__(self) -> None:
        find_variants(self.architectures)
        for name in ("rounds", "steps", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1. Raise it.")
        if self.operators < 0:
            raise ValueError(f"operators ({self.operators}) must be at least 0. Raise it.")
        check_heads(self)


def check_heads(shape: Any) -> None:
    """Heads divide the hidden size, and groups of them the heads; else a ValueError says so."""
    for name, of in (
        ("hidden_size", "num_attention_heads"),
        ("num_attention_heads", "num_query_groups"),
    ):
        value, divisor = getattr(shape, name), getattr(shape, of)
        if divisor < 1 or value % divisor:
            raise ValueError(
                f"{name} ({value}) must be a multiple of {of} ({divisor}). Change one of them."
            )


class _Trainer:
    """One model, its gradient buffers and optimizer, and a batch."""

    def __init__(self, options: BenchmarkOptions, architecture: str) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        torch.manual_seed(0)
        model: Any = _build_model(options, architecture)
        buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=options.bf16)
        self.model = DistributedDataParallel(model.config, buffers, model)
        config = OptimizerConfig(
            lr=1e-4,
            weight_decay=0.1,
            adam_beta2=0.95,
            bf16=options.bf16,
            params_dtype=model.config.params_dtype,
        )
        self.optimizer = get_megatron_optimizer(config, [self.model])
        self.device = next(self.model.parameters()).device
        size = (options.micro_batch_size, options.seq_length + 1)
        ids = torch.randint(options.vocab_size, size).to(self.device)
        self.tokens, self.labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        positions = torch.arange(options.seq_length, device=self.device)
        self.positions = positions.expand(options.micro_batch_size, -1)

    @property
    def updates_with(self) -> str:
        """The classes that update: Megatron's, and whose Adam it is."""
        (optimizer,) = self.optimizer.chained_optimizers
        adam = type(optimizer.optimizer)
        return f"Megatron's {type(optimizer).__name__} over {adam.__module__}.{adam.__name__}"

    def loss(self) -> torch.Tensor:
        return self.model(self.tokens, self.positions, None, labels=self.labels).float().mean()

    def step(self) -> Step:
        """One forward, backward and update; seconds of the whole and of each."""
        start = self.clock()
        loss = self.loss()
        forward = self.clock()
        loss.backward()
        self.model.finish_grad_sync()
        backward = self.clock()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.zero_grad_buffer()
        end = self.clock()
        return end - start, forward - start, backward - forward, end - backward

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass
class _Run:
    """What one process has measured, all by place of the architecture.

    Attributes:
        turns: of each round, the steps that one took in it.
        saved: bytes that a forward pass keeps for backward.
        operators: seconds of each in a step.
        updates_with: names the optimizer.
    """

    turns: list[list[list[Step]]]
    saved: list[int]
    operators: list[dict[str, float]]
    updates_with: str

    def ratios(self, place: int, part: int) -> list[float]:
        """Of every turn to that of the first in the same round."""
        return [
            _median(mine, part) / _median(first, part)
            for mine, first in zip(self.turns[place], self.turns[0], strict=True)
        ]


def run_benchmark(options: BenchmarkOptions) -> dict[str, Any]:
    """Measure all architectures.

    Returns:
        Options, device, optimizer, versions, load average before, and per architecture the median,
        minimum and maximum step time (ms), those of forward, backward and optimizer, bytes that
        autograd keeps for backward and the peak memory (MiB), and all of these over those of the
        first one; of times also the quartiles of all turns' ratios ("..._spread"). "operators":
        name, milliseconds of a step, and those more than in the first one's step.
    """
    load = os.getloadavg()[0]
    cuda = _start(options.device)
    if cuda:
        memory = [_peak_on_gpu(options, a) for a in options.architectures]
    else:
        memory = [measure_in_own_process(_peak_on_cpu, options, a) for a in options.architectures]
    runs = [_measure(options)]
    torch.distributed.destroy_process_group()
    runs += [measure_in_own_process(_measure_there, options) for _ in range(options.processes - 1)]
    tokens = options.micro_batch_size * options.seq_length
    flops = tokens * count_training_flops(options)
    most = peak_flops(torch.cuda.get_device_name()) if cuda and options.bf16 else None
    rows = []
    for place, architecture in enumerate(options.architectures):
        row = {"architecture": architecture, **_times(runs, place)}
        seconds, peak, saved = row["median_ms"] / 1e3, memory[place], runs[0].saved
        row |= {
            "tokens_per_s": tokens / seconds,
            "tflops_per_s": flops / seconds / 1e12,
            "mfu": flops / seconds / most if most else None,
            "peak_mib": peak / 2**20,
            "peak_memory_ratio": peak / memory[0] if memory[0] else None,
            "saved_mib": saved[place] / 2**20,
            "saved_ratio": saved[place] / saved[0],
        }
        if options.operators:
            found = runs[0].operators
            row["operators"] = largest_differences(found[place], found[0], options.operators)
        rows.append(row)
    return {
        "options": vars(options),
        "device": torch.cuda.get_device_name()
        if cuda
        else f"cpu, {torch.get_num_threads()} threads, load average {load:.1f} before",
        "optimizer": runs[0].updates_with,
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "measured": rows,
    }


def _times(runs: list[_Run], place: int) -> dict[str, Any]:
    every = [step for run in runs for turn in run.turns[place] for step in turn]
    row: dict[str, Any] = {
        "median_ms": _median(every, 0) * 1e3,
        "min_ms": min(every)[0] * 1e3,
        "max_ms": max(every)[0] * 1e3,
    }
    for part, name in enumerate(PARTS):
        if part:
            row[f"{name}_ms"] = _median(every, part) * 1e3
        ratios = [ratio for run in runs for ratio in run.ratios(place, part)]
        row[f"{name}_ratio"] = statistics.median(ratios)
        low, _, high = statistics.quantiles(
            ratios if len(ratios) > 1 else ratios * 2, n=4, method="inclusive"
        )
        row[f"{name}_spread"] = [low, high]
    return row


def _measure(options: BenchmarkOptions) -> _Run:
    trainers = [_Trainer(options, architecture) for architecture in options.architectures]
    saved = [bytes_saved(trainer.model, trainer.loss) for trainer in trainers]
    for trainer in trainers:
        trainer.step()  # the first step allocates
    turns: list[list[list[Step]]] = [[] for _ in trainers]
    for _ in range(options.rounds):
        for trainer, taken in zip(trainers, turns, strict=True):
            taken.append([trainer.step() for _ in range(options.steps)])
    operators: list[dict[str, float]] = []
    if options.operators:
        steps = [trainer.step for trainer in trainers]
        operators = seconds_by_operator(steps, trainers[0].device)
    return _Run(turns, saved, operators, trainers[0].updates_with)


def _measure_there(options: BenchmarkOptions) -> _Run:
    _start(options.device)
    return _measure(replace(options, operators=0))


def _median(steps: list[Step], part: int) -> float:
    return statistics.median(step[part] for step in steps)


def format_table(figures: dict[str, Any]) -> str:
    """The figures of `run_benchmark` as a table."""
    lines = [
        f"device: {figures['device']}",
        f"optimizer: {figures['optimizer']}",
        f"{'':<26}{'median ms':>11}{'min':>9}{'max':>9}{'ratio (quartiles)':>23}{'forward':>9}"
        f"{'backward':>10}{'optimizer':>11}{'tokens/s':>11}{'MFU':>7}{'peak MiB':>11}{'ratio':>8}"
        f"{'saved MiB':>11}{'ratio':>8}",
    ]
    for row in figures["measured"]:
        low, high = row["step_time_spread"]
        ratio = f"{row['step_time_ratio']:.3f} ({low:.3f} {high:.3f})"
        lines.append(
            f"{row['architecture']:<26}{row['median_ms']:>11.1f}{row['min_ms']:>9.1f}"
            f"{row['max_ms']:>9.1f}{ratio:>23}{row['forward_ratio']:>9.3f}"
            f"{row['backward_ratio']:>10.3f}{row['optimizer_ratio']:>11.3f}"
            f"{row['tokens_per_s']:>11.0f}"
            + (f"{row['mfu']:>7.3f}" if row["mfu"] else f"{'':>7}")
            + f"{row['peak_mib']:>11.1f}"
            + (f"{row['peak_memory_ratio']:>8.3f}" if row["peak_memory_ratio"] else f"{'':>8}")
            + f"{row['saved_mib']:>11.2f}{row['saved_ratio']:>8.4f}"
        )
    for row in figures["measured"][1:] if figures["options"]["operators"] else ():
        first = figures["measured"][0]["architecture"]
        lines.append(f"{row['architecture']}: ms of a step more than {first}'s, and in all")
        lines += [
            f"    {entry['more_ms']:>+9.2f}{entry['ms']:>9.2f}  {entry['name']}"
            for entry in row["operators"]
        ]
    return "\n".join(lines)


def _peak_on_gpu(options: BenchmarkOptions, architecture: str) -> int:
    """Bytes that the allocator gave out for training at its peak."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer = _Trainer(options, architecture)
    for _ in range(MEMORY_STEPS):
        trainer.step()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(options: BenchmarkOptions, architecture: str) -> int:
    """Bytes that this process needs for training at its peak, beyond the imported libraries."""
    _start(options.device)
    _Trainer(options, architecture)  # whatever the first model imports is not the model's
    gc.collect()  # its buffers and hooks hold each other
    before = resident("VmRSS")
    trainer = _Trainer(options, architecture)
    for _ in range(MEMORY_STEPS):
        trainer.step()
    torch.distributed.destroy_process_group()
    return resident("VmHWM") - before


def _start(device: str) -> bool:
    from megatron.core import parallel_state, tensor_parallel

    cuda = choose_device(device)
    store = torch.distributed.HashStore()
    backend = "nccl" if cuda else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    return cuda


def _build_model(options: BenchmarkOptions, architecture: str) -> torch.nn.Module:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_satformer.arguments import has_transformer_engine
    from megatron_satformer.model.builder import DecoderModelBuilder

    impl = options.transformer_impl
    if impl == "auto":
        engine = torch.cuda.device_count() > 0 and has_transformer_engine()
        impl = "transformer_engine" if engine else "local"
    config = configure_model(options, architecture, impl, options.bf16)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return DecoderModelBuilder(config).build_model(groups, True, True).cuda()


def configure_model(shape: Any, architecture: str, impl: str, bf16: bool) -> Any:
    """The DecoderModelConfig of an architecture, or of a control, at a shape.

    Args:
        shape: with sizes named as Megatron's flags, as `BenchmarkOptions`.
        architecture: by the name of its variant.
        impl: "local" or "transformer_engine".
        bf16: weights and activations; else fp32.
    """
    from megatron_satformer.model.builder import DecoderModelConfig, build_layer_spec

    (variant,) = find_variants([architecture])
    config = find_architecture(variant.architecture).config(
        architecture=variant.architecture,
        **variant.options,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        ffn_hidden_size=shape.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        qk_layernorm=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        transformer_impl=impl,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        bf16=bf16,
    )
    return DecoderModelConfig(
        transformer=config,
        transformer_layer_spec=build_layer_spec,
        vocab_size=shape.vocab_size,
        seq_length=shape.seq_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )
