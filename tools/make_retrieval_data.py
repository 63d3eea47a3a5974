"""Makes retrieval tasks, with a seed and no network, to train on and to evaluate with."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.analysis.retrieval.examples import Difficulty
from megatron_satformer.analysis.retrieval.files import Plan, build_retrieval_data
from megatron_satformer.analysis.retrieval.tasks import TASKS
from megatron_satformer.cli import ToolParser, add_flags_of, run_tool
from megatron_satformer.data.reading.documents import read_documents
from megatron_satformer.data.reading.inputs import ON_UNKNOWN, find_inputs
from megatron_satformer.data.reading.separators import unescape_separator
from megatron_satformer.data.tokenizers.decoding import take_tokenizer
from megatron_satformer.data.tokenizers.hugging_face import hide_torch
from megatron_satformer.data.tokenizers.options import (
    add_tokenizer_arguments,
    take_tokenizer_options,
)

PLAN = "tasks lengths train_lengths depths train valid test words seed".split()
DIFFICULTY = "pairs power_a copies copied_words noise_words distractors entries digits".split()


def _parser() -> ToolParser:
    parser = ToolParser(
        description=__doc__,
        epilog="Without --tokenizer-type, --vocab-size N makes a tokenizer of N single words.",
    )
    parser.add_argument("--save", type=Path, required=True, help="Folder to make.")
    parser.add_argument("--overwrite", action="store_true", help="Replace earlier tasks at --save.")
    group = parser.add_argument_group("what to make")
    add_flags_of(
        group,
        Plan,
        *PLAN,
        tasks={"choices": list(TASKS)},
        lengths={"type": int},
        train_lengths={"type": int},
        depths={"type": float},
    )
    add_flags_of(parser.add_argument_group("how difficult"), Difficulty, *DIFFICULTY)
    group = parser.add_argument_group("real text, for passkey")
    group.add_argument(
        "--input", nargs="+", help="Files, globs or folders, as preprocess_data.py takes them."
    )
    group.add_argument("--json-key", default="text", help="Key whose text is used.")
    group.add_argument(
        "--document-separator", help="What stands between two documents of a .txt file."
    )
    group.add_argument(
        "--on-unknown",
        choices=ON_UNKNOWN,
        default="error",
        help="What to do where a folder or glob holds a file of a kind that is not read.",
    )
    add_tokenizer_arguments(parser, required=False)
    return parser


def _read_texts(args: dict) -> list[str]:
    given, key = args.pop("input"), args.pop("json_key")
    separator, unknown = args.pop("document_separator"), args.pop("on_unknown")
    if given is None:
        return []
    separator = unescape_separator(separator)
    sources = find_inputs(given, separator, unknown).sources
    return [text for (text,) in read_documents(sources, [key], separator) if text and text.strip()]


def main() -> None:
    """Parses the flags and writes the tasks."""
    args = vars(_parser().parse_args())
    hide_torch()
    options = None
    if args["tokenizer_type"] is None:
        take_tokenizer(args)  # which refuses flags of a tokenizer that is not named
    else:
        options = take_tokenizer_options(args)
    vocab_size = args.pop("vocab_size", None)
    plan = Plan(**{name: _tuple(args.pop(name)) for name in PLAN})
    how = Difficulty(**{name: args.pop(name) for name in DIFFICULTY})
    texts = _read_texts(args)
    counts = build_retrieval_data(
        args["save"], plan, how, options, vocab_size, texts, args["overwrite"]
    )
    print(f"{args['save']}: {sum(counts.values())} examples in {len(counts)} data sets")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    run_tool(main)
