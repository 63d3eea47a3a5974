"""Shows what a --data-path blend will serve: weights, documents, tokens, samples, epochs, texts."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.cli import ToolParser, run_tool
from megatron_satformer.data.tokenizers.decoding import take_tokenizer, text_of
from megatron_satformer.data.tokenizers.options import add_tokenizer_arguments
from megatron_satformer.data.training.blend_report import (
    draw_documents,
    render_blend,
    report_blend,
    wanted_samples,
)

SHOWN = 64


def _parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    group = parser.add_argument_group("training, by Megatron's names")
    group.add_argument(
        "--data-path", nargs="+", required=True, help="Prefixes, or weights and prefixes in turn."
    )
    group.add_argument("--split", help="Train, valid and test; 969,30,1 if left out.")
    group.add_argument("--seq-length", type=int, required=True, help="Tokens per sample.")
    group.add_argument("--global-batch-size", type=int, help="Samples per step.")
    group.add_argument("--train-iters", type=int, help="Steps.")
    group.add_argument("--train-samples", type=int, help="Samples, in place of steps.")
    group.add_argument("--eval-iters", type=int, help="Steps of an evaluation; 100 if left out.")
    group.add_argument("--eval-interval", type=int, help="Steps between two; one if left out.")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--show",
        type=int,
        default=0,
        help=f"Documents of the first split to show, {SHOWN} tokens each.",
    )
    group.add_argument("--seed", type=int, help="Of what is shown; 1234 if left out.")
    group.add_argument("--json", action="store_true", help="Print one JSON object.")
    add_tokenizer_arguments(parser, required=False)
    return parser


def main() -> None:
    """Parses the flags, computes, prints."""
    args = vars(_parser().parse_args())
    names = ("train_iters", "train_samples", "global_batch_size", "eval_iters", "eval_interval")
    wanted = wanted_samples(**{name: args[name] for name in names})
    tokenizer = take_tokenizer(args)
    if not args["show"] and tokenizer is not None:
        raise ValueError("tokenizer_type (given) must come with show. Pass --show 5, say.")
    if not args["show"] and args["seed"] is not None:
        raise ValueError(f"seed ({args['seed']}) must come with show. Pass --show 5, say.")
    if tokenizer is None and args["vocab_size"] is not None:
        raise ValueError(
            f"vocab_size ({args['vocab_size']}) must come with tokenizer_type. Pass it."
        )
    reports = report_blend(args["data_path"], args["split"], args["seq_length"], wanted)
    seed = 1234 if args["seed"] is None else args["seed"]
    drawn = draw_documents(reports[0], args["split"], args["show"], seed)
    shown = [
        {
            "prefix": sample.prefix,
            "sequence": sample.sequence,
            "tokens": sample.tokens.size,
            "beginning": text_of(tokenizer, sample.tokens[:SHOWN]),
        }
        for sample in drawn
    ]
    if args["json"]:
        content = {"splits": [asdict(report) for report in reports], "shown": shown}
        print(json.dumps(content, indent=2, ensure_ascii=False))
        return
    print(render_blend(reports))
    for one in shown:
        print(
            f"\n--- {one['prefix']}, document {one['sequence']}, {one['tokens']} tokens\n"
            f"{one['beginning']}"
        )


if __name__ == "__main__":
    run_tool(main)
