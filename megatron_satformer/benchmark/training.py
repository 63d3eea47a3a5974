"""Training steps of architectures at one shape, side by side on one device.

One process steps A, B, C, A, B, C, ... so that all meet the same machine; ratios are to A. Memory
differs from process to process by some percent; what autograd keeps is counted, to the byte. Peak
memory is taken per architecture: on a GPU from the allocator, on the CPU as the peak resident set
of a process of its own, above what it held before the model was built.
"""

import gc
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from megatron_satformer.backend.device import choose_device
from megatron_satformer.backend.process_memory import resident
from megatron_satformer.benchmark.fresh_process import measure_in_own_process
from megatron_satformer.benchmark.saved import bytes_saved
from megatron_satformer.benchmark.utilization import count_training_flops, peak_flops
from megatron_satformer.config import DecoderOptions
from megatron_satformer.model.architectures import PLAIN, find_architecture
from megatron_satformer.model.variants import find_variants

MEMORY_STEPS = 3


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is measured; sizes as Megatron's flags of the same names."""

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
    bf16: bool = False
    device: str = "auto"
    transformer_impl: str = "auto"

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"processes ({self.processes}) must be at least 1. Raise it.")


class _Trainer:
    """One model, its optimizer and a batch."""

    def __init__(self, options: BenchmarkOptions, architecture: str) -> None:
        torch.manual_seed(0)
        self.model = _build_model(options, architecture)
        self.device = next(self.model.parameters()).device
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=fused)
        size = (options.micro_batch_size, options.seq_length + 1)
        ids = torch.randint(options.vocab_size, size).to(self.device)
        self.tokens, self.labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        positions = torch.arange(options.seq_length, device=self.device)
        self.positions = positions.expand(options.micro_batch_size, -1)

    def loss(self) -> torch.Tensor:
        return self.model(self.tokens, self.positions, None, labels=self.labels).float().mean()

    def step(self) -> tuple[float, ...]:
        """One forward, backward and update; seconds of the whole, of forward and of backward."""
        start = self.clock()
        loss = self.loss()
        forward = self.clock()
        loss.backward()
        backward = self.clock()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.clock() - start, forward - start, backward - forward

    def clock(self) -> float:
        self.synchronize()
        return time.perf_counter()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def run_benchmark(options: BenchmarkOptions) -> dict[str, Any]:
    """Measure all architectures.

    Returns:
        Options, device, and per architecture the median, minimum and maximum step time (ms), those
        of forward and backward, bytes that autograd keeps for backward and the peak memory (MiB),
        and all of these over those of the first one. Of several processes a ratio of times is the
        median of theirs.
    """
    cuda = _start(options.device)
    if cuda:
        memory = [_peak_on_gpu(options, a) for a in options.architectures]
    else:
        memory = [measure_in_own_process(_peak_on_cpu, options, a) for a in options.architectures]
    runs = [_measure(options)]
    torch.distributed.destroy_process_group()
    runs += [measure_in_own_process(_measure_there, options) for _ in range(options.processes - 1)]
    saved = runs[0][1]
    tokens = options.micro_batch_size * options.seq_length
    flops = tokens * count_training_flops(options)
    most = peak_flops(torch.cuda.get_device_name()) if cuda and options.bf16 else None
    rows: list[dict[str, Any]] = []
    for place, architecture in enumerate(options.architectures):
        peak = memory[place]
        every = [step for times, _ in runs for step in times[place]]
        median, forward, backward = (_median(every, part) for part in range(3))
        ratios = [
            statistics.median(
                _median(times[place], part) / _median(times[0], part) for times, _ in runs
            )
            for part in range(3)
        ]
        rows.append(
            {
                "architecture": architecture,
                "median_ms": median * 1e3,
                "min_ms": min(every)[0] * 1e3,
                "max_ms": max(every)[0] * 1e3,
                "tokens_per_s": tokens / median,
                "tflops_per_s": flops / median / 1e12,
                "mfu": flops / median / most if most else None,
                "peak_mib": peak / 2**20,
                "step_time_ratio": ratios[0],
                "forward_ms": forward * 1e3,
                "forward_ratio": ratios[1],
                "backward_ms": backward * 1e3,
                "backward_ratio": ratios[2],
                "saved_mib": saved[place] / 2**20,
                "saved_ratio": saved[place] / saved[0],
                "peak_memory_ratio": peak / memory[0] if memory[0] else None,
            }
        )
    return {
        "options": vars(options),
        "device": torch.cuda.get_device_name()
        if cuda
        else f"cpu, {torch.get_num_threads()} threads",
        "measured": rows,
    }


def _measure(options: BenchmarkOptions) -> tuple[list[list[tuple[float, ...]]], list[int]]:
    """Per architecture the times of its steps, and the bytes that one keeps for backward."""
    trainers = [_Trainer(options, architecture) for architecture in options.architectures]
    times: list[list[tuple[float, ...]]] = [[] for _ in trainers]
    saved = [bytes_saved(trainer.model, trainer.loss) for trainer in trainers]
    for trainer in trainers:
        trainer.step()  # the first step allocates
    for _ in range(options.rounds):
        for trainer, taken in zip(trainers, times, strict=True):
            taken += [trainer.step() for _ in range(options.steps)]
    return times, saved


def _measure_there(options: BenchmarkOptions) -> tuple[list[list[tuple[float, ...]]], list[int]]:
    _start(options.device)
    return _measure(options)


def _median(steps: list[tuple[float, ...]], part: int) -> float:
    return statistics.median(step[part] for step in steps)


def format_table(figures: dict[str, Any]) -> str:
    """The figures of `run_benchmark` as a table."""
    lines = [f"device: {figures['device']}"]
    lines.append(
        f"{'':<18}{'median ms':>11}{'min':>9}{'max':>9}{'ratio':>8}{'tokens/s':>11}{'MFU':>7}"
        f"{'peak MiB':>11}{'ratio':>8}{'saved MiB':>11}{'ratio':>8}{'forward':>9}{'backward':>9}"
    )
    for row in figures["measured"]:
        lines.append(
            f"{row['architecture']:<18}{row['median_ms']:>11.1f}{row['min_ms']:>9.1f}"
            f"{row['max_ms']:>9.1f}{row['step_time_ratio']:>8.3f}{row['tokens_per_s']:>11.0f}"
            + (f"{row['mfu']:>7.3f}" if row["mfu"] else f"{'':>7}")
            + f"{row['peak_mib']:>11.1f}"
            + (f"{row['peak_memory_ratio']:>8.3f}" if row["peak_memory_ratio"] else f"{'':>8}")
            + f"{row['saved_mib']:>11.2f}{row['saved_ratio']:>8.4f}"
            + f"{row['forward_ratio']:>9.3f}{row['backward_ratio']:>9.3f}"
        )
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


def _build_model(options: BenchmarkOptions, architecture: Any) -> torch.nn.Module:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_satformer.arguments import has_transformer_engine
    from megatron_satformer.model.builder import (
        DecoderModelBuilder,
        DecoderModelConfig,
        build_layer_spec,
    )

    impl = options.transformer_impl
    if impl == "auto":
        engine = torch.cuda.device_count() > 0 and has_transformer_engine()
        impl = "transformer_engine" if engine else "local"
    (variant,) = find_variants([architecture])
    config = find_architecture(variant.architecture).config(
        architecture=variant.architecture,
        **variant.options,
        num_layers=options.num_layers,
        hidden_size=options.hidden_size,
        num_attention_heads=options.num_attention_heads,
        num_query_groups=options.num_query_groups,
        ffn_hidden_size=options.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        qk_layernorm=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        transformer_impl=impl,
        params_dtype=torch.bfloat16 if options.bf16 else torch.float32,
        bf16=options.bf16,
    )
    model_config = DecoderModelConfig(
        transformer=config,
        transformer_layer_spec=build_layer_spec,
        vocab_size=options.vocab_size,
        seq_length=options.seq_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return DecoderModelBuilder(model_config).build_model(groups, True, True).cuda()
