#!/usr/bin/env python3
"""What this machine's GPU does with every architecture: tests, then speed; gpu_report.json.

    make test-gpu
    python tests/gpu/suite.py --report gpu_report.json -k satformer

Finds out what is there, runs what that allows (pytest -m gpu tests/gpu), times training steps at
the 130M shape, and prints what it measured. Arguments that are not its own go to pytest. Without a
GPU it says so and ends.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_satformer.benchmark.training import BenchmarkOptions, format_table, run_benchmark
from megatron_satformer.files.atomic import write_atomically
from megatron_satformer.machine.parts import describe_machine
from megatron_satformer.model.architectures import TABLE

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = tuple(TABLE)  # the tests add one of their own
SHAPE_130M = {
    "hidden_size": 768,
    "num_layers": 11,
    "num_attention_heads": 12,
    "num_query_groups": 12,
    "ffn_hidden_size": 3072,
    "seq_length": 4096,
    "vocab_size": 32000,
    "micro_batch_size": 4,
    "bf16": True,
    "rounds": 6,
    "steps": 2,
}


class Collector:
    """Outcomes, durations and figures of all tests, as a plugin of pytest."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.removeprefix("tests/gpu/")
        if report.when == "call" or report.outcome != "passed":
            entry = {"outcome": report.outcome, "seconds": round(report.duration, 1)}
            if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
                entry["why"] = report.longrepr[2]
            elif report.outcome == "failed":
                entry["why"] = report.longreprtext[-2000:]
                print(f"\n{name}\n{entry['why']}", flush=True)  # a run cut short tells too
            self.outcomes[name] = entry | dict(report.user_properties)


def format_figures(outcomes: dict[str, dict[str, Any]]) -> str:
    """A line per comparison with the plain twin."""
    rows = [entry["figures"] for entry in outcomes.values() if "figures" in entry]
    lines = [f"{'':<18}{'spec':<20}{'dtype':<10}{'loss':>10}{'gradient':>10}{'twin':>10}"]
    lines += [
        f"{row['architecture']:<18}{row['spec']:<20}{row['dtype']:<10}{row['loss']:>10.1e}"
        f"{row['gradient']:>10.1e}{row['gradient of the twin in it']:>10.1e}"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Run what the machine allows; 0 unless a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--report", type=Path, default=Path("gpu_report.json"), metavar="FILE")
    parser.add_argument("--no-speed", action="store_true", help="leave out the timed steps")
    parser.add_argument("--workers", default="4", metavar="N", help="tests at a time")
    args, for_pytest = parser.parse_known_args()
    if not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} finds none here, so nothing was run")
        return 0
    start = time.monotonic()
    os.chdir(ROOT)
    machine = describe_machine()
    print(*(f"{name:<22}{value}" for name, value in machine.items()), sep="\n", flush=True)
    collector = Collector()
    command = ["-m", "gpu", "tests/gpu", "-q", "-n", args.workers, "--dist", "loadgroup"]
    code = int(pytest.main([*command, *for_pytest], plugins=[collector]))
    speed = [] if args.no_speed else [run_benchmark(BenchmarkOptions(ARCHITECTURES, **SHAPE_130M))]
    report = {
        "machine": machine,
        "tests": collector.outcomes,
        "speed": speed,
        "seconds": round(time.monotonic() - start),
    }
    write_atomically(args.report, (json.dumps(report, indent=2, default=str) + "\n").encode())
    print(format_figures(collector.outcomes))
    print(*map(format_table, speed), sep="\n")
    counts = Counter(entry["outcome"] for entry in collector.outcomes.values())
    reasons = {
        entry["why"] for entry in collector.outcomes.values() if entry["outcome"] == "skipped"
    }
    print(*(f"not run: {reason}" for reason in sorted(reasons)), sep="\n")
    print(f"{dict(counts)} in {report['seconds']} s; {args.report}")
    return code


if __name__ == "__main__":
    sys.exit(main())
