"""Merges data sets (.bin and .idx) into one, with the flags and the bytes of Megatron-LM's tool."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.cli import ToolParser, run_tool
from megatron_satformer.data.datasets.merge import merge_datasets


def _parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    group = parser.add_argument_group("input data")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="Folder with the data sets, merged sorted by name; or prefixes, in this order.",
    )
    group = parser.add_argument_group("output data")
    group.add_argument("--output-prefix", required=True, help="Writes PREFIX.bin and PREFIX.idx.")
    group.add_argument("--overwrite", action="store_true", help="Replace existing output.")
    group.add_argument(
        "--no-sha256",
        action="store_true",
        help="Write no PREFIX.manifest.json, whose checksums inspect_dataset.py --verify reads: "
        "those in the inputs' manifests, and fresh ones for inputs without.",
    )
    group = parser.add_argument_group("miscellaneous")
    group.add_argument("--multimodal", action="store_true", help="Refused: text only.")
    return parser


def main() -> None:
    """Parses the flags and merges."""
    args = _parser().parse_args()
    if args.multimodal:
        raise NotImplementedError(
            "multimodal (True) is not supported: these tools know data sets of text, without a "
            "mode for each sequence. Use Megatron-LM's tools/merge_datasets.py for others."
        )
    start = time.perf_counter()
    summary = merge_datasets(args.input, args.output_prefix, args.overwrite, not args.no_sha256)
    seconds = time.perf_counter() - start
    print(
        f"{summary.datasets} data sets, {summary.documents} documents, {summary.tokens} tokens of "
        f"{summary.dtype} in {seconds:.1f} s ({summary.bytes / seconds / 1e6:.1f} MB/s): "
        f"{args.output_prefix}.bin/.idx"
    )


if __name__ == "__main__":
    run_tool(main)
