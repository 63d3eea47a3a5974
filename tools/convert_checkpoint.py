"""Converts checkpoints of this project to other formats, on the CPU."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megatron_satformer.checkpoint.to_hf import DTYPES, export_to_hf
from megatron_satformer.data.cli import ToolParser, run_tool


def _parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser(
        "to-hf",
        help="A Megatron checkpoint to a Hugging Face folder.",
        description="Turns a Megatron checkpoint (torch_dist, any layout) into a folder that "
        "transformers loads with trust_remote_code=True.",
    )
    to_hf.add_argument(
        "--load", type=Path, required=True, help="Folder given as --save in training."
    )
    to_hf.add_argument("--step", type=int, help="Iteration; default: the last one saved.")
    to_hf.add_argument("--save", type=Path, required=True, help="Folder to make.")
    to_hf.add_argument("--dtype", choices=DTYPES, help="Default: the one trained in.")
    to_hf.add_argument(
        "--tokenizer",
        help="SentencePiece .model file, Hugging Face folder, or none. Default: the checkpoint's.",
    )
    to_hf.add_argument("--max-shard-size", default="5GB", help="Of one safetensors file.")
    to_hf.add_argument(
        "--overwrite", action="store_true", help="Replace an earlier export at --save."
    )
    return parser


def main() -> None:
    """Parses the flags and converts."""
    args = vars(_parser().parse_args())
    args.pop("command")
    made = export_to_hf(**args)
    print(
        f"{made.folder}: step {made.step}, {made.parameters:,} parameters in {made.dtype}, "
        f"{made.bytes / 1e6:.1f} MB, {made.seconds:.1f} s"
    )


if __name__ == "__main__":
    run_tool(main)
