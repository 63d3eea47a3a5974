"""The exported Hugging Face classes beside transformers' own of the same shape, on the CPU.

A process holds all models and lets them take turns: at each prompt, and at each token of greedy
decoding with the cache. Neighbours in time meet the same machine, so a ratio of two models is the
median over their neighbouring measurements. Where in memory a model comes to lie favours one or the
other by some percent for as long as the process lives: so several processes are measured, each of
which builds another model first. Peak memory is the peak resident set while one model
alone reads and decodes in a process of its own, above what that held before the model was built.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_satformer.backend.process_memory import resident
from megatron_satformer.benchmark.fresh_process import measure_in_own_process
from megatron_satformer.checkpoint.hugging_face.code import config_class, model_class
from megatron_satformer.model.architectures import PLAIN, TABLE

MEMORY_RUNS = 3


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is measured; sizes as Megatron's flags of the same names, seq_length is the prompt's.

    Attributes:
        architectures: Of our models; transformers' own is Qwen3ForCausalLM, or LlamaForCausalLM
            without qk_layernorm.
        new_tokens: Decoded after each prompt.
        processes: That the models take turns in, one after the other.
        rounds: Prompts of each model in each process.
    """

    architectures: tuple[str, ...] = tuple(name for name in TABLE if name != PLAIN)
    hidden_size: int = 768
    num_layers: int = 11
    num_attention_heads: int = 12
    num_query_groups: int = 12
    ffn_hidden_size: int = 3072
    seq_length: int = 512
    micro_batch_size: int = 1
    vocab_size: int = 32000
    new_tokens: int = 32
    processes: int = 3
    rounds: int = 6
    qk_layernorm: bool = True
    bf16: bool = False

    def __post_init__(self) -> None:
        for name, of in (
            ("hidden_size", "num_attention_heads"),
            ("num_attention_heads", "num_query_groups"),
        ):
            value, divisor = getattr(self, name), getattr(self, of)
            if value % divisor:
                raise ValueError(
                    f"{name} ({value}) must be a multiple of {of} ({divisor}). Change one of them."
                )
        for name in ("num_layers", "seq_length", "new_tokens", "rounds"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 2. Raise it.")
        if self.processes < 1:
            raise ValueError(f"processes ({self.processes}) must be at least 1. Raise it.")

    @property
    def stock(self) -> str:
        """Name of the class that ours are compared to."""
        return "Qwen3ForCausalLM" if self.qk_layernorm else "LlamaForCausalLM"

    @property
    def names(self) -> tuple[str, ...]:
        """All models, transformers' own first."""
        return (self.stock, *self.architectures)


def run_benchmark(options: BenchmarkOptions) -> dict[str, Any]:
    """Measure all models.

    Returns:
        Options, threads, load average before, and per model the median and minimum time (ms) of a
        prompt and of a token and the peak memory (MiB); for ours also "prefill_speed" and
        "decode_speed", ours / transformers' (above 1 is faster), and "peak_memory_ratio".
    """
    load = os.getloadavg()[0]
    # allocator and threads make one run differ from the next by some percent
    peaks = {
        name: statistics.median(
            measure_in_own_process(_peak_memory, options, name) for _ in range(MEMORY_RUNS)
        )
        for name in options.names
    }
    prefill, decode = _run_processes(options)
    rows = []
    for name in options.names:
        row: dict[str, Any] = {"model": name, "peak_mib": peaks[name] / 2**20}
        for what, times in (("prefill", prefill), ("decode", decode)):
            row[f"{what}_median_ms"] = statistics.median(times[name]) * 1e3
            row[f"{what}_min_ms"] = min(times[name]) * 1e3
            if name != options.stock:
                row[f"{what}_speed"] = median_speed(times[options.stock], times[name])
                row[f"{what}_speed_of_minima"] = min(times[options.stock]) / min(times[name])
        if name != options.stock:
            stock = peaks[options.stock]  # 0 where the model is too small to be seen
            row["peak_memory_ratio"] = peaks[name] / stock if stock else None
        rows.append(row)
    return {
        "options": vars(options),
        "device": f"cpu, {torch.get_num_threads()} threads, load average {load:.1f} before",
        "measured": rows,
    }


def median_speed(stock: list[float], ours: list[float]) -> float:
    """The median over neighbouring measurements of how many times as fast ours is."""
    return statistics.median(theirs / own for theirs, own in zip(stock, ours, strict=True))


def format_table(figures: dict[str, Any]) -> str:
    """The figures of `run_benchmark` as a table; speeds are ours / transformers'."""
    options = figures["options"]
    lines = [
        f"device: {figures['device']}",
        f"batch {options['micro_batch_size']}, prompt {options['seq_length']}, "
        f"{options['processes']} processes x {options['rounds']} x {options['new_tokens']} tokens",
        f"speed and memory over {figures['measured'][0]['model']}'s, speed by neighbouring pairs "
        "(by minima)",
        f"{'':<18}{'prefill ms':>11}{'min':>9}{'speed':>16}{'decode ms':>11}{'min':>8}"
        f"{'speed':>16}{'peak MiB':>10}{'ratio':>7}",
    ]
    for row in figures["measured"]:
        cells = f"{row['model']:<18}"
        for what, width in (("prefill", 9), ("decode", 8)):
            median, least = row[f"{what}_median_ms"], row[f"{what}_min_ms"]
            speed = (
                f"{row[f'{what}_speed']:.3f} ({row[f'{what}_speed_of_minima']:.3f})"
                if f"{what}_speed" in row
                else ""
            )
            cells += f"{median:>11.1f}{least:>{width}.1f}{speed:>16}"
        memory = row.get("peak_memory_ratio")
        ratio = "" if memory is None else f"{memory:.3f}"
        lines.append(f"{cells}{row['peak_mib']:>10.1f}{ratio:>7}")
    return "\n".join(lines)


class _Reader:
    """One model that reads a prompt and then writes greedily, one token a call."""

    def __init__(self, options: BenchmarkOptions, name: str) -> None:
        torch.manual_seed(0)
        self.model = build_model(options, name)
        size = (options.micro_batch_size, options.seq_length)
        self.prompt = torch.randint(options.vocab_size, size)
        self.ids, self.cache = self.prompt, None

    def read(self) -> None:
        self.ids, self.cache = self.prompt, None
        self.write()

    def write(self) -> None:
        out = self.model(self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.ids, self.cache = out.logits.argmax(-1), out.past_key_values


Times = dict[str, list[float]]  # model -> seconds


def _run_processes(options: BenchmarkOptions) -> tuple[Times, Times]:
    """Seconds of every prompt, and of every token, by model."""
    prefill: Times = {name: [] for name in options.names}
    decode: Times = {name: [] for name in options.names}
    for first in range(options.processes):
        found = measure_in_own_process(_take_turns, options, first)
        for total, times in zip((prefill, decode), found, strict=True):
            for name in options.names:
                total[name] += times[name]
    return prefill, decode


def _take_turns(options: BenchmarkOptions, first: int = 0) -> tuple[Times, Times]:
    """Seconds of every prompt, and of every token, by model; number `first` is built first."""
    first %= len(options.names)
    order = [*options.names[first:], *options.names[:first]]
    prefill: Times = {name: [] for name in order}
    decode: Times = {name: [] for name in order}
    with torch.inference_mode():
        readers = {name: _Reader(options, name) for name in order}
        for reader in readers.values():  # the first calls allocate
            reader.read()
            reader.write()
        for _ in range(options.rounds):
            for name in order:
                prefill[name].append(_seconds(readers[name].read))
            for _ in range(options.new_tokens):
                for name in order:
                    decode[name].append(_seconds(readers[name].write))
            order = [*order[1:], order[0]]  # no model always follows the same one
    return prefill, decode


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _peak_memory(options: BenchmarkOptions, name: str) -> int:
    """Bytes that this process needs for the model at its peak, beyond the imported libraries."""
    tiny = BenchmarkOptions(
        hidden_size=48,
        num_layers=2,
        ffn_hidden_size=64,
        seq_length=8,
        vocab_size=64,
        qk_layernorm=options.qk_layernorm,
    )
    with torch.inference_mode():
        _Reader(tiny, name).read()  # what the first call imports
        before = resident("VmRSS")
        reader = _Reader(options, name)
        # the peak of building it, with embeddings and head not yet tied, is not what decoding needs
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
        reader.read()
        for _ in range(options.new_tokens):
            reader.write()
    return resident("VmHWM") - before


def build_model(options: BenchmarkOptions, name: str) -> PreTrainedModel:
    """One of `options.names` with random weights."""
    shape: dict[str, Any] = {
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "intermediate_size": options.ffn_hidden_size,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": options.num_attention_heads,
        "num_key_value_heads": options.num_query_groups,
        "head_dim": options.hidden_size // options.num_attention_heads,
        "max_position_embeddings": options.seq_length + options.new_tokens + 1,
        "tie_word_embeddings": True,
    }
    if name == "Qwen3ForCausalLM":
        model, config = Qwen3ForCausalLM, Qwen3Config(**shape)
    elif name == "LlamaForCausalLM":
        model, config = LlamaForCausalLM, LlamaConfig(**shape)
    else:
        model = model_class(name)
        config = config_class(name)(**shape, qk_norm=options.qk_layernorm)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    return model._from_config(config, dtype=dtype).eval()
