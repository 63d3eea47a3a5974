"""Tokenizes text into Megatron's .bin/.idx files, with the flags of Megatron-LM's tool.

Killed at any moment, the same command continues; the output appears once it is complete.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.cli import ToolParser, add_flags_of, run_tool
from megatron_satformer.data.preprocess.main import preprocess
from megatron_satformer.data.preprocess.options import BACKENDS, ON_ERROR, PreprocessOptions
from megatron_satformer.data.reading.inputs import ON_UNKNOWN
from megatron_satformer.data.reading.separators import unescape_separator
from megatron_satformer.data.tokenizers.hugging_face import hide_torch
from megatron_satformer.data.tokenizers.options import (
    add_tokenizer_arguments,
    take_tokenizer_options,
)

# Flags of Megatron-LM's tool, old and new, that change nothing here, and why.
WITHOUT_EFFECT = {
    "dataset_impl": "mmap is the only format",
    "chunk_size": "work is cut by bytes",
    "partitions": "the order of the input is kept, as with --keep-sequential-samples, and "
    "--workers alone says how many processes work",
    "keep_sequential_samples": "the order of the input is always kept",
}
REFUSED = {
    "split_sentences": "data sets of sentences are for BERT",
    "keep_newlines": "it belongs to --split-sentences, which is for BERT",
    "lang": "it belongs to --split-sentences, which is for BERT",
    "find_optimal_num_workers": "every core is used unless --workers says otherwise",
    "workers_to_check": "it belongs to --find-optimal-num-workers",
    "max_documents": "it belongs to --find-optimal-num-workers; give less input instead",
}


def _parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    group = parser.add_argument_group("input data")
    add_flags_of(
        group,
        PreprocessOptions,
        *("input", "json_keys", "document_separator", "on_error", "on_unknown"),
        on_error={"choices": ON_ERROR},
        on_unknown={"choices": ON_UNKNOWN},
    )
    add_tokenizer_arguments(parser)
    group = parser.add_argument_group("tokenization process")
    names = ("append_eod", "keep_empty", "tokenizer_backend", "verify_fraction")
    add_flags_of(group, PreprocessOptions, *names, tokenizer_backend={"choices": BACKENDS})
    group = parser.add_argument_group("output data")
    names = ("output_prefix", "overwrite", "num_parts", "part")
    add_flags_of(group, PreprocessOptions, *names)
    group = parser.add_argument_group("runtime")
    add_flags_of(group, PreprocessOptions, "workers", "log_interval", "json_log")
    _add_other_arguments(parser)
    return parser


def _add_other_arguments(parser: ToolParser) -> None:
    group = parser.add_argument_group(
        "flags of Megatron-LM's tool that change nothing here, or are refused"
    )
    group.add_argument("--dataset-impl", choices=["mmap"], help=argparse.SUPPRESS)
    group.add_argument("--chunk-size", type=int, help=argparse.SUPPRESS)
    group.add_argument("--partitions", type=int, help="Changes nothing; see --workers.")
    group.add_argument(
        "--keep-sequential-samples",
        action="store_const",
        const=True,
        help="Changes nothing: the order of the input is always kept.",
    )
    for name in ("--split-sentences", "--keep-newlines", "--find-optimal-num-workers"):
        group.add_argument(name, action="store_const", const=True, help="Refused.")
    for name in ("--lang", "--max-documents"):
        group.add_argument(name, help="Refused.")
    group.add_argument("--workers-to-check", nargs="+", help="Refused.")


def _take_other_arguments(args: dict[str, Any]) -> None:
    for name, reason in REFUSED.items():
        value = args.pop(name)
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')} is refused: {reason}. Leave it out.")
    for name, reason in WITHOUT_EFFECT.items():
        if args.pop(name) is not None:
            flag = f"--{name.replace('_', '-')}"
            print(f"note: {flag} changes nothing here: {reason}.", file=sys.stderr)


def main() -> None:
    """Parses the flags and tokenizes."""
    args = vars(_parser().parse_args())
    _take_other_arguments(args)
    hide_torch()
    tokenizer = take_tokenizer_options(args)
    args["document_separator"] = unescape_separator(args["document_separator"])
    summary = preprocess(PreprocessOptions(tokenizer=tokenizer, **args))
    done = summary.text_bytes - summary.resumed_bytes
    left_out = f"{summary.empty_documents} empty, {summary.rejected_documents} rejected"
    if summary.unread_files:
        left_out += f", {summary.unread_files} files not read"
    print(
        f"{summary.documents} documents ({left_out}), {summary.tokens} tokens of {summary.dtype} "
        f"in {summary.seconds:.1f} s ({done / summary.seconds / 1e6:.1f} MB/s; "
        f"{summary.backend} tokenizer, {summary.verified_documents} documents verified, "
        f"{summary.routed_documents} by the reference): {', '.join(summary.prefixes)}.bin/.idx"
    )


if __name__ == "__main__":
    run_tool(main)
