"""Runs the quickstart: real text to a trained, exported and sampled model, on CPU or GPU."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.cli import ToolParser, run_tool
from megatron_satformer.quickstart.steps import run_quickstart


def _parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    parser.add_argument(
        "--output", default="runs/quickstart", help="Folder of the run; a new or an earlier one."
    )
    parser.add_argument("--fresh", action="store_true", help="Remove the earlier run first.")
    parser.add_argument("--train-iters", type=int, default=200, help="Training steps.")
    return parser


def main() -> None:
    """Parses the flags and runs what is missing."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # also into a file
    sys.exit(run_quickstart(**vars(_parser().parse_args())))


if __name__ == "__main__":
    run_tool(main)
