#!/usr/bin/env python3
"""Compare training steps of architectures at one shape on the current device.

    python tools/benchmark.py --architectures transformer satformer resformer
    python tools/benchmark.py --roofline
    python tools/benchmark.py --hf
    python tools/benchmark.py --vllm .venv/vllm/bin

Runs A B C A B C ... in one process, so that all meet the same machine, and prints the median step
time, the bytes kept for backward and the peak memory of each, also over those of A. With
--roofline, nothing is timed: what a step moves and computes, against a GPU's limits. With --hf, the
exported Hugging Face models read a prompt and decode on the CPU beside transformers' own Qwen3 (or
Llama) of the same shape; with --vllm, vLLM serves them. Not a test: times depend on the machine.
"""

import argparse
import json
import os
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.cli import run_tool

# written out: importing them costs Megatron's imports, also in each process that --hf starts
SIZES = (
    *("hidden_size", "num_layers", "num_attention_heads", "num_query_groups"),
    *("ffn_hidden_size", "seq_length", "micro_batch_size", "vocab_size"),
)


def _parser() -> argparse.ArgumentParser:
    """Flags of both benchmarks; what is not given takes the default of the one that runs."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS
    )
    parser.add_argument(
        "--hf", action="store_true", default=False, help="beside transformers' own, on the CPU"
    )
    parser.add_argument(
        "--vllm",
        metavar="BIN",
        help="as --hf, served by the vLLM of the environment in BIN; takes the flags of --hf",
    )
    parser.add_argument(
        "--roofline",
        action="store_true",
        default=False,
        help="computed instead: the least time of a step at 1.3B, or the sizes given, on a GPU",
    )
    parser.add_argument("--gpu", help="with --roofline: h100, h200, b200 or a100")
    parser.add_argument("--eager", action="store_true", help="with --vllm: nothing compiled")
    parser.add_argument(
        "--architectures",
        nargs="+",
        metavar="A",
        help="the baseline, and what is compared to it, controls that records name too; with --hf: "
        "architectures beside transformers' own",
    )
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--rounds", type=int, help="of one turn each; with --hf: prompts of each")
    parser.add_argument("--processes", type=int, help="one after the other; ratios: their median")
    parser.add_argument("--steps", type=int, help="steps of each per round")
    parser.add_argument(
        "--operators",
        type=int,
        metavar="N",
        help="also the N operators of each whose time differs most from the baseline's",
    )
    parser.add_argument("--new-tokens", type=int, help="with --hf: decoded after each prompt")
    parser.add_argument(
        "--no-qk-layernorm",
        dest="qk_layernorm",
        action="store_false",
        help="with --hf: Llama's shape instead of Qwen3's",
    )
    parser.add_argument("--bf16", action="store_true", help="bf16 weights and activations")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"])
    parser.add_argument(
        "--transformer-impl",
        choices=["auto", "local", "transformer_engine"],
        help="auto: Transformer Engine where there is one and a GPU",
    )
    parser.add_argument("--json", metavar="FILE", default=None, help="also write figures to FILE")
    return parser


def main() -> None:
    """Parse, measure, print."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # read when torch is imported
    args = vars(_parser().parse_args())
    target, hf, roofline = args.pop("json"), args.pop("hf"), args.pop("roofline")
    if target and not Path(target).absolute().parent.is_dir():
        raise ValueError(f"json ({target}) must be in a folder that exists. Make it first.")
    if hf + roofline + ("vllm" in args) > 1:
        raise ValueError(
            "hf, roofline, vllm (given) must not be given together. Leave all but one."
        )
    if "vllm" in args:
        kind, where = "benchmark.serving", "with --vllm"
    elif roofline:
        kind, where = "planning.roofline", "with --roofline"
    else:
        kind, where = "benchmark.training", "without --hf"
        if hf:
            kind, where = "benchmark.hugging_face", "with --hf"
    benchmark = import_module(f"megatron_satformer.{kind}")
    for name in args.keys() - {field.name for field in fields(benchmark.BenchmarkOptions)}:
        raise ValueError(f"{name} ({args[name]}) must not be given {where}. Leave it out.")
    figures = benchmark.run_benchmark(benchmark.BenchmarkOptions(**args))
    print(benchmark.format_table(figures))
    if target:
        Path(target).write_text(json.dumps(figures, indent=2) + "\n")
    else:
        print(json.dumps(figures))


if __name__ == "__main__":
    run_tool(main)
