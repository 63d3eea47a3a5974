#!/usr/bin/env python3
"""Trains architectures on the same tokens, and says which differences are shown.

examples/compare/run.sh makes the data and calls this.
"""

import os
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.cli import ToolParser, add_flags_of, run_tool
from megatron_satformer.comparison.prepare import RetrievalOptions, build_corpus
from megatron_satformer.comparison.report import add_comparisons, write_report
from megatron_satformer.comparison.run import CompareOptions, Comparison, measure_cost
from megatron_satformer.comparison.tasks import retrieval_task, text_task
from megatron_satformer.comparison.trials import TrialError
from megatron_satformer.config import DecoderOptions
from megatron_satformer.files.locks import open_locked
from megatron_satformer.model.architectures import PLAIN
from megatron_satformer.model.variants import all_variants, find_variants
from megatron_satformer.sizes import SIZES

CORPUS = ("data_path", "tokenizer_type", "tokenizer_model")
SMOKE = {
    "archs": [PLAIN, DecoderOptions.architecture],
    "steps": 16,
    "seeds": 2,
    "lr_factors": [1.0],
}


def _parser() -> ToolParser:
    parser = ToolParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--save", type=Path, required=True, help="Folder of the comparison; what is there is kept.")
    add("--archs", nargs="+", metavar="A", help=f"Of {', '.join(all_variants())}.")
    add("--baselines", nargs="+", metavar="A", help="What all are compared with; the first arch.")
    add("--data-path", help="Prefix of a tokenized corpus; Shakespeare and Milton if left out.")
    add("--split", default="95,5,0", help="As pretrain_satformer.py has it.")
    add("--tokenizer-type", help="Of the corpus.")
    add("--tokenizer-model", help="Of the corpus.")
    add("--no-text", action="store_true", help="Retrieval tasks alone.")
    add("--smoke", action="store_true", help="Two architectures for a few steps: does it run?")
    add("--no-cost", action="store_true", help="Do not measure step time and memory.")
    further: dict[str, dict[str, Any]] = {
        "size": {"choices": list(SIZES)},
        "lr_factors": {"type": float},
    }
    add_flags_of(parser, CompareOptions, *_names(CompareOptions), **further)
    add_flags_of(
        parser.add_argument_group("retrieval tasks"),
        RetrievalOptions,
        *_names(RetrievalOptions),
        retrieval_tasks={"nargs": "*"},
    )
    return parser


def _names(options: type) -> list[str]:
    return [field.name for field in fields(options)]


def main() -> int:
    """Parses the flags, runs the trials, writes the report."""
    args = vars(_parser().parse_args())
    command = shlex.join(["python", "tools/compare.py", *sys.argv[1:]])
    save = args.pop("save")
    if args.pop("smoke"):
        args |= SMOKE
    variants = find_variants(args.pop("archs"), "archs")
    baselines = args.pop("baselines") or [variants[0].name]
    for name in baselines:
        if name not in [variant.name for variant in variants]:
            raise ValueError(f"baselines ({name}) must be of archs. Add it there.")
    split, text, costs = args.pop("split"), not args.pop("no_text"), not args.pop("no_cost")
    wanted = RetrievalOptions(**{name: args.pop(name) for name in _names(RetrievalOptions)})
    corpus = {name: args.pop(name) for name in CORPUS}
    if len({value is None for value in corpus.values()}) > 1:
        missing = next(name for name, value in corpus.items() if value is None)
        raise ValueError(f"{missing} must be given with the others of {', '.join(CORPUS)}.")
    if not (text or wanted.retrieval_tasks):
        raise ValueError("no_text must leave a task to train on. Name some by --retrieval-tasks.")
    options = CompareOptions(**args | {"lr_factors": tuple(args["lr_factors"])})
    save.mkdir(parents=True, exist_ok=True)
    busy = f"save ({save}) is in use by another comparison. Wait for it, or choose another."
    open_locked(save / "lock", os.O_RDWR | os.O_CREAT, busy)
    tasks = []
    if wanted.retrieval_tasks:  # first: what is too hard for its length is refused here
        size = SIZES[options.size]
        samples = options.steps * size.global_batch_size if options.steps else None
        data, length = wanted.build(save, size.seq_length, samples), wanted.retrieval_length
        tasks += [
            retrieval_task(name, data, length, size.seq_length) for name in wanted.retrieval_tasks
        ]
    if text:
        corpus = corpus if corpus["data_path"] else build_corpus(save)
        tasks.insert(0, text_task(**corpus, split=split))
    comparison = Comparison(save, options, variants, {task.name: task for task in tasks})
    try:
        results = comparison.run()
    except TrialError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    results["cost"] = measure_cost(save, options, variants) if costs else None
    add_comparisons(results, baselines)
    for path in write_report(results, save, command):
        print(path)
    for made in results["comparisons"].values():
        print(*(one["told"] for one in made), sep="\n")
    return 0


if __name__ == "__main__":
    run_tool(main)
