"""Trains a tokenizer: SentencePiece BPE with byte fallback, or Hugging Face byte-level BPE."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.cli import ToolParser, run_tool
from megatron_satformer.data.tokenizers.training import TYPES, train_tokenizer


def _parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="Files, globs, folders or - for standard input: JSON lines, Parquet or text, as "
        "preprocess_data.py takes them.",
    )
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="Keys whose text is used.")
    parser.add_argument(
        "--document-separator", help="What stands between two documents of a .txt file."
    )
    parser.add_argument(
        "--tokenizer-type", choices=TYPES, default=TYPES[0], help="As Megatron calls it."
    )
    parser.add_argument("--vocab-size", type=int, required=True, help="Number of ids.")
    parser.add_argument(
        "--max-bytes",
        type=int,
        help="Learn from a random sample of documents of this many bytes together; all if left "
        "out. SentencePiece holds what it learns from in memory, several times over.",
    )
    parser.add_argument(
        "--output",
        required=True,
        help="A folder, for tokenizer.model and tokenizer.vocab or for tokenizer.json and "
        "tokenizer_config.json; for SentencePieceTokenizer also a name ending in .model.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace an existing tokenizer.")
    return parser


def main() -> None:
    """Parses the flags and trains."""
    args = vars(_parser().parse_args())
    trained = train_tokenizer(args.pop("input"), **args)
    print(
        f"{trained.vocab_size} pieces from {trained.documents} documents "
        f"({trained.text_bytes / 1e6:.1f} MB) in {trained.seconds:.1f} s: {trained.model}"
    )


if __name__ == "__main__":
    run_tool(main)
