"""The exported classes served by vLLM on the CPU, beside transformers' own of the same shape.

vLLM has an environment of its own, where `benchmark/in_vllm.py` runs. The stock model is measured
twice there: as vLLM's own code, and through the Transformers backend, as ours are.
"""

import json
import os
import random
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_satformer.benchmark import hugging_face
from megatron_satformer.benchmark.hugging_face import build_model, median_speed
from megatron_satformer.checkpoint.convert.to_hf import write_config

THROUGH = " (Transformers backend)"


@dataclass(frozen=True)
class BenchmarkOptions(hugging_face.BenchmarkOptions):
    """Those of `benchmark/hugging_face.py`; micro_batch_size is the prompts served at a time.

    Attributes:
        vllm: Folder with the Python of an environment that has vLLM.
        eager: Without vLLM's compilation.
    """

    micro_batch_size: int = 8
    vllm: str = ".venv/vllm/bin"
    eager: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (Path(self.vllm) / "python").exists():
            raise ValueError(
                f"vllm ({self.vllm}) must be a folder with the python of vLLM's environment. "
                "make test-vllm makes one, .venv/vllm/bin."
            )


def run_benchmark(options: BenchmarkOptions) -> dict[str, Any]:
    """Serve all models.

    Returns:
        Options, load average before, and per model the tokens a second of reading and of writing,
        all prompts together; each beside the stock model through the same backend, as the median
        of neighbouring measurements ("prefill_speed", "decode_speed", above 1 is faster).
    """
    load = os.getloadavg()[0]
    read = options.micro_batch_size * options.seq_length
    written = options.micro_batch_size * (options.new_tokens - 1)
    base, times = options.stock + THROUGH, _serve(options)
    rows = []
    for name, taken in times.items():
        row: dict[str, Any] = {"model": name}
        for what, tokens in (("prefill", read), ("decode", written)):
            row[f"{what}_tokens_s"] = tokens / statistics.median(taken[what])
            row[f"{what}_speed"] = median_speed(times[base][what], taken[what])
        rows.append(row)
    return {
        "options": vars(options),
        "device": f"cpu, {os.cpu_count()} cores, load average {load:.1f} before",
        "measured": rows,
    }


def format_table(figures: dict[str, Any]) -> str:
    """The figures of `run_benchmark` as a table."""
    options = figures["options"]
    lines = [
        f"device: {figures['device']}",
        f"{options['micro_batch_size']} prompts of {options['seq_length']} tokens, "
        f"{options['new_tokens']} new, {options['processes']} processes x {options['rounds']}",
        f"{'':<42}{'prompt tokens/s':>16}{'ratio':>7}{'new tokens/s':>14}{'ratio':>7}",
    ]
    for row in figures["measured"]:
        lines.append(
            f"{row['model']:<42}{row['prefill_tokens_s']:>16.0f}{row['prefill_speed']:>7.3f}"
            f"{row['decode_tokens_s']:>14.1f}{row['decode_speed']:>7.3f}"
        )
    return "\n".join(lines)


def _serve(options: BenchmarkOptions) -> dict[str, dict[str, list[float]]]:
    """Name -> seconds of reading all prompts, and of writing, in every round of every process."""
    total: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as parent:
        cases = _write_models(options, Path(parent))
        for first in range(options.processes):
            names = [*cases][first % len(cases) :] + [*cases][: first % len(cases)]
            answer = _run(options, Path(parent), {name: cases[name] for name in names})
            for name in cases:
                of_model = total.setdefault(name, {"prefill": [], "decode": []})
                of_model["prefill"] += answer[name]["prefill"]
                both = zip(answer[name]["whole"], answer[name]["prefill"], strict=True)
                of_model["decode"] += [whole - prefill for whole, prefill in both]
    return total


def _write_models(options: BenchmarkOptions, parent: Path) -> dict[str, dict[str, Any]]:
    """Name -> folder and engine options of each model to serve, random weights in them."""
    cases: dict[str, dict[str, Any]] = {}
    for name in options.names:
        model = build_model(options, name)
        model.save_pretrained(parent / name)
        if name != options.stock:
            write_config(model.config, model.config, parent / name)
        cases[name] = {"folder": str(parent / name), "engine": {}}
    through = {"model_impl": "transformers"}
    return {
        options.stock: cases[options.stock],
        options.stock + THROUGH: cases[options.stock] | {"engine": through},
        **{name: cases[name] for name in options.architectures},
    }


def _run(options: BenchmarkOptions, folder: Path, cases: dict[str, Any]) -> dict[str, Any]:
    """What `in_vllm.py` answers."""
    length = options.seq_length + options.new_tokens
    blocks = options.micro_batch_size * (length + 128)  # 128: vLLM's block
    kv_size = options.num_query_groups * options.hidden_size // options.num_attention_heads
    request = {
        "cases": cases,
        "rounds": options.rounds,
        "tokens": options.new_tokens,
        "prompts": [
            random.Random(n).choices(range(options.vocab_size), k=options.seq_length)
            for n in range(options.micro_batch_size)
        ],
        "engine": {
            "trust_remote_code": True,
            "skip_tokenizer_init": True,
            "dtype": "bfloat16" if options.bf16 else "float32",
            "enforce_eager": options.eager,
            "max_model_len": length,
            "enable_prefix_caching": False,  # the same prompts are read again
            "kv_cache_memory_bytes": blocks * options.num_layers * 2 * kv_size * 4,
            "distributed_executor_backend": "uni",
        },
    }
    (folder / "request.json").write_text(json.dumps(request))
    script = Path(__file__).with_name("in_vllm.py")
    run = subprocess.run(
        [Path(options.vllm) / "python", script, folder / "request.json", folder / "answer.json"],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        last = (run.stdout + run.stderr).strip()[-2000:]
        raise ValueError(f"vllm ({options.vllm}) must serve the models. It ended with:\n{last}")
    return json.loads((folder / "answer.json").read_text())
