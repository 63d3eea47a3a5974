"""Shows what a data set (.bin and .idx) holds, its documents as text, and whether it is whole."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.cli import ToolParser, run_tool
from megatron_satformer.data.datasets.report import open_dataset, render_report, report_dataset
from megatron_satformer.data.datasets.verify import verify_dataset
from megatron_satformer.data.tokenizers.decoding import take_tokenizer, text_of
from megatron_satformer.data.tokenizers.options import add_tokenizer_arguments


def _parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    parser.add_argument("prefix", help="The data set: its path without .bin.")
    parser.add_argument(
        "--document", type=int, nargs="+", default=[], help="Documents to show, counted from 0."
    )
    parser.add_argument(
        "--histogram-bins", type=int, default=64, help="Most lines of the histogram of lengths."
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="Read everything: range of the tokens (--vocab-size or the tokenizer's), sha256 "
        "against the manifest.",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    add_tokenizer_arguments(parser, required=False)
    return parser


def main() -> None:
    """Parses the flags, looks, prints."""
    args = vars(_parser().parse_args())
    tokenizer = take_tokenizer(args)
    vocab_size = args["vocab_size"] if tokenizer is None else tokenizer.vocab_size
    if tokenizer is None and vocab_size is not None and not args["verify"]:
        raise ValueError(f"vocab_size ({vocab_size}) must come with verify. Pass --verify.")
    data = open_dataset(args["prefix"])
    report = report_dataset(data, args["histogram_bins"])
    documents = [(number, data.document(number)) for number in args["document"]]
    texts = [(number, tokens.size, text_of(tokenizer, tokens)) for number, tokens in documents]
    found = verify_dataset(data, vocab_size) if args["verify"] else None
    if args["json"]:
        content: dict[str, Any] = asdict(report)
        content["shown"] = [
            {"document": number, "ids": tokens.tolist(), "text": text if tokenizer else None}
            for (number, tokens), (_, _, text) in zip(documents, texts, strict=True)
        ]
        content["verified"] = asdict(found) if found else None
        print(json.dumps(content, indent=2, ensure_ascii=False))
        return
    print(render_report(report))
    for number, size, text in texts:
        print(f"\n--- document {number}, {size} tokens\n{text}")
    if found:
        compared = f"as in {found.manifest}" if found.manifest else "no manifest to compare with"
        bounds = f"in [0, {vocab_size})" if vocab_size else "no --vocab-size to compare with"
        print(
            f"\nverified: every offset, length and boundary; tokens {found.smallest_token} to "
            f"{found.largest_token} ({bounds}); sha256 ({compared}):"
        )
        begin = 0
        for part in found.bin_checksums:
            whole = len(found.bin_checksums) == 1
            print(f"{part.sha256}  .bin{'' if whole else f', {part.bytes} bytes from {begin} on'}")
            begin += part.bytes
        print(f"{found.idx_sha256}  .idx")


if __name__ == "__main__":
    run_tool(main)
