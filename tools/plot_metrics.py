#!/usr/bin/env python3
"""Draws runs on top of each other, from the metrics.jsonl that training writes.

python tools/plot_metrics.py runs/satformer runs/transformer --save loss.png
python tools/plot_metrics.py ours=runs/a/checkpoints theirs=runs/b --metric grad_norm --x tokens ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.analysis.run_plots import X_AXES, plot_runs
from megatron_satformer.cli import ToolParser, add_flags_of, run_tool


def main() -> None:
    """Parses the flags, draws, tells what was drawn."""
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a run, or its file.")
    axis = {"choices": X_AXES}
    add_flags_of(parser, plot_runs, "save", "metric", "x", "log_scale", x=axis)
    args = vars(parser.parse_args())
    for curve, points in plot_runs(**args).items():
        print(f"{curve}: {points} points")
    print(args["save"])


if __name__ == "__main__":
    run_tool(main)
