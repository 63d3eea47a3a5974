"""Trains a tokenizer: SentencePiece BPE with byte fallback, or Hugging Face byte-level BPE."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.cli import ToolParser, add_flags_of, run_tool
from megatron_satformer.data.reading.inputs import ON_UNKNOWN
from megatron_satformer.data.reading.separators import unescape_separator
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
    add_flags_of(
        parser,
        train_tokenizer,
        *("json_keys", "document_separator", "on_unknown", "tokenizer_type"),
        *("vocab_size", "max_bytes", "output", "overwrite"),
        tokenizer_type={"choices": TYPES},
        on_unknown={"choices": ON_UNKNOWN},
    )
    return parser


def main() -> None:
    """Parses the flags and trains."""
    args = vars(_parser().parse_args())
    args["document_separator"] = unescape_separator(args["document_separator"])
    trained = train_tokenizer(args.pop("input"), **args)
    print(
        f"{trained.vocab_size} pieces from {trained.documents} documents "
        f"({trained.text_bytes / 1e6:.1f} MB) in {trained.seconds:.1f} s: {trained.model}"
    )


if __name__ == "__main__":
    run_tool(main)
