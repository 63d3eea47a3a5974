"""Makes evaluation tasks for lm_eval that run offline, from text that was not trained on."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.analysis.local_tasks import build_local_tasks
from megatron_satformer.cli import ToolParser, run_tool
from megatron_satformer.data.reading.inputs import ON_UNKNOWN
from megatron_satformer.data.reading.separators import unescape_separator

TEMPLATES = Path(__file__).resolve().parents[1] / "examples/evaluate/tasks"


def _parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="Files, globs or folders: JSON lines, Parquet or text, as preprocess_data.py takes "
        "them.",
    )
    parser.add_argument("--save", type=Path, required=True, help="Folder to make.")
    parser.add_argument(
        "--split",
        help="As in training, such as 95,5,0: the validation documents alone are used. Default: "
        "all documents.",
    )
    parser.add_argument("--json-key", default="text", help="Key whose text is used.")
    parser.add_argument(
        "--document-separator", help="What stands between two documents of a .txt file."
    )
    parser.add_argument(
        "--on-unknown",
        choices=ON_UNKNOWN,
        default="error",
        help="What to do where a folder or glob holds a file of a kind that is not read.",
    )
    parser.add_argument("--samples", type=int, default=200, help="At most, per task.")
    parser.add_argument(
        "--passage-words",
        type=int,
        default=60,
        help="Length of a passage; the model must be made for about twice as many tokens.",
    )
    parser.add_argument("--seed", type=int, default=1234, help="Of the choice of passages.")
    parser.add_argument(
        "--templates",
        type=Path,
        default=TEMPLATES,
        help="Folder of the tasks' YAML files.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace earlier tasks at --save.")
    return parser


def main() -> None:
    """Parses the flags and writes the tasks."""
    args = vars(_parser().parse_args())
    args["document_separator"] = unescape_separator(args["document_separator"])
    print(build_local_tasks(args.pop("input"), **args))


if __name__ == "__main__":
    run_tool(main)
