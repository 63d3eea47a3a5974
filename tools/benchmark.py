#!/usr/bin/env python3
"""Compare training steps of two architectures at one shape on the current device.

    python tools/benchmark.py --architectures transformer satformer

Runs A B A B ... in one process, so that both meet the same machine, and prints the median step time
and the peak memory of each, with B / A. Not a test: figures depend on the machine.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.benchmark import BenchmarkOptions, format_table, run_benchmark
from megatron_satformer.config import ARCHITECTURES


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--architectures",
        nargs=2,
        choices=ARCHITECTURES,
        default=["transformer", "satformer"],
        metavar=("A", "B"),
        help="the baseline, and what is compared to it",
    )
    shape = BenchmarkOptions()
    for name in ("hidden_size", "num_layers", "num_attention_heads", "num_query_groups"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(shape, name))
    for name in ("ffn_hidden_size", "seq_length", "micro_batch_size", "vocab_size"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(shape, name))
    parser.add_argument("--rounds", type=int, default=shape.rounds, help="A B pairs")
    parser.add_argument("--steps", type=int, default=shape.steps, help="steps of each per round")
    parser.add_argument("--bf16", action="store_true", help="bf16 weights and activations")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    args = vars(parser.parse_args())
    target = args.pop("json")
    figures = run_benchmark(BenchmarkOptions(**args))
    print(format_table(figures))
    if target:
        Path(target).write_text(json.dumps(figures, indent=2) + "\n")
    else:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
