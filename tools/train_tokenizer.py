"""Trains a SentencePiece BPE tokenizer with byte fallback on JSON lines."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.data.cli import ToolParser, run_tool
from megatron_satformer.data.train_tokenizer import train_tokenizer


def _parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="JSON lines files, plain or .gz.")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="Keys whose text is used.")
    parser.add_argument("--vocab-size", type=int, required=True, help="Number of pieces.")
    parser.add_argument(
        "--output",
        required=True,
        help="A folder for tokenizer.model and tokenizer.vocab, or a name ending in .model.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace an existing model.")
    return parser


def main() -> None:
    """Parses the flags and trains."""
    args = _parser().parse_args()
    trained = train_tokenizer(
        args.input, args.output, args.vocab_size, args.json_keys, args.overwrite
    )
    print(
        f"{trained.vocab_size} pieces from {trained.documents} documents "
        f"({trained.text_bytes / 1e6:.1f} MB) in {trained.seconds:.1f} s: {trained.model}"
    )


if __name__ == "__main__":
    run_tool(main)
