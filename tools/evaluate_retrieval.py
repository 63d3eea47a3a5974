"""Exact match of a Megatron checkpoint or Hugging Face folder on retrieval tasks."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.cli import ToolParser, add_model_flags, run_tool


def _parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    add_model_flags(parser)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="Folder made by make_retrieval_data.py.")
    add("--save", type=Path, required=True, help="JSON file to write.")
    add("--tasks", nargs="+", help="Those to evaluate; all if left out.")
    add("--lengths", type=int, nargs="+", help="Those to evaluate; all if left out.")
    add("--limit", type=int, help="Examples of each task and length; all if left out.")
    add("--batch-size", type=int, default=8, help="Examples at a time.")
    return parser


def main() -> None:
    """Parses the flags, loads the model, evaluates and writes the results."""
    args = vars(_parser().parse_args())
    # --help and mistakes of the command line do not wait for torch
    from megatron_satformer.analysis.generate import load_model
    from megatron_satformer.analysis.retrieval.accuracy import evaluate_retrieval, find_test_sets
    from megatron_satformer.files.atomic import write_atomically

    data, save = args.pop("data"), args.pop("save")
    if save.is_dir():
        raise ValueError(f"save ({save}) must be a file to write, not a folder. Add a name.")
    sets = find_test_sets(data, args.pop("tasks"), args.pop("lengths"))
    limit, batch_size = args.pop("limit"), args.pop("batch_size")
    model, tokenizer = load_model(**args)
    results = evaluate_retrieval(model, tokenizer, sets, batch_size, limit)
    told = {"model": str(args["load"]), "step": args["step"], "data": str(data), "tasks": results}
    write_atomically(save, (json.dumps(told, indent=2) + "\n").encode())
    print(f"evaluate_retrieval: {save}")


if __name__ == "__main__":
    run_tool(main)
