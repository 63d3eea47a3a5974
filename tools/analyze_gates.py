"""What the gates of a model do, or other learned weights of what earlier layers made, on text."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.cli import ToolParser, add_flags_of, add_model_flags, run_tool


def _parser() -> ToolParser:
    parser = ToolParser(
        description=__doc__,
        epilog="Writes gates.json, PNG heat maps and gates.html, and prints what was claimed of "
        "gates with a verdict. docs/gates.md says what is what.",
    )
    add_model_flags(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="Folder to make.")
    add("--overwrite", action="store_true", help="Replace an earlier analysis at --out.")
    return parser


def main() -> None:
    """Parses the flags, loads the model, analyzes it and writes the folder."""
    from megatron_satformer.analysis.gates.plan import FLAGS, Plan

    parser = _parser()
    add_flags_of(parser.add_argument_group("what to read"), Plan, *FLAGS)
    args = vars(parser.parse_args())
    plan = Plan(**{name: args.pop(name) for name in FLAGS})
    # --help and mistakes of the command line do not wait for torch
    from megatron_satformer.analysis.gates.inputs import open_inputs
    from megatron_satformer.analysis.gates.report import MARKER, analyze
    from megatron_satformer.analysis.generate import load_model
    from megatron_satformer.files.output_folder import check_target, written_atomically

    out, overwrite = args.pop("out"), args.pop("overwrite")
    with written_atomically(out, "out") as folder:
        check_target(out, MARKER, overwrite, "out")
        opened = open_inputs(plan)
        about = {"model": str(args["load"]), "step": args["step"], "data": plan.data}
        result = analyze(*load_model(**args), plan, opened, folder, about)
    print(f"analyze_gates: {out}, {result['tokens']} tokens, {len(result['rows'])} rows")


if __name__ == "__main__":
    run_tool(main)
