"""Runs lm_eval on an exported folder; flags that are not listed are lm_eval's own."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.analysis.evaluation import evaluate
from megatron_satformer.cli import ToolParser, add_flags_of, run_tool


def main() -> None:
    """Parses the flags and runs the tasks."""
    parser = ToolParser(description=__doc__)
    names = "model tasks save batch_size device dtype prefix_token_id".split()
    paths = {"model": {"type": Path}, "save": {"type": Path}}
    add_flags_of(parser, evaluate, *names, **paths)
    args, flags = parser.parse_known_args()
    files = evaluate(**vars(args), flags=flags)
    print("evaluate: written", *files, sep="\n    ")


if __name__ == "__main__":
    run_tool(main)
