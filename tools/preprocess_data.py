"""Tokenizes JSON lines into Megatron's .bin/.idx files, with the flags of Megatron-LM's tool."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.data.cli import ToolParser, run_tool
from megatron_satformer.data.preprocess import PreprocessOptions, preprocess
from megatron_satformer.data.tokenizers import TokenizerOptions, add_tokenizer_arguments


def _parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    group = parser.add_argument_group("input data")
    group.add_argument(
        "--input", nargs="+", required=True, help="JSON lines files, plain or .gz, in this order."
    )
    group.add_argument(
        "--json-keys", nargs="+", default=["text"], help="Keys to tokenize, one data set each."
    )
    add_tokenizer_arguments(parser)
    group = parser.add_argument_group("tokenization process")
    group.add_argument(
        "--append-eod", action="store_true", help="End every document with the tokenizer's eod."
    )
    group = parser.add_argument_group("output data")
    group.add_argument(
        "--output-prefix", required=True, help="Writes PREFIX_KEY_document.bin and .idx."
    )
    group.add_argument("--overwrite", action="store_true", help="Replace existing output.")
    group = parser.add_argument_group("runtime")
    group.add_argument("--workers", type=int, help="Number of processes; every core if left out.")
    group.add_argument(
        "--log-interval", type=int, default=1000, help="Documents between progress updates."
    )
    return parser


def main() -> None:
    """Parses the flags and tokenizes."""
    args = vars(_parser().parse_args())
    names = ("tokenizer_type", "tokenizer_model", "vocab_size")
    tokenizer = TokenizerOptions(**{name: args.pop(name) for name in names})
    summary = preprocess(PreprocessOptions(tokenizer=tokenizer, **args))
    seconds = summary.seconds
    print(
        f"{summary.documents} documents ({summary.empty_documents} empty), {summary.tokens} "
        f"tokens of {summary.dtype} in {seconds:.1f} s ({summary.json_bytes / seconds / 1e6:.1f} "
        f"MB/s, {summary.tokens / seconds / 1e3:.0f}k tokens/s): "
        f"{', '.join(summary.prefixes)}.bin/.idx"
    )


if __name__ == "__main__":
    run_tool(main)
