#!/usr/bin/env python3
"""Tells what a run will need and take, before a GPU is paid for; needs none itself.

    python tools/plan.py --model-size 1.3b --gpus 64 --gpu h100 --tensor-model-parallel-size 2
    python tools/plan.py --model-size 1.3b --gpus 64 --gpu h100 --search

Flags are those of pretrain_satformer.py, which does the same with --dry-run. Where no data are
named it plans without any, and where no tokenizer is, for 32000 pieces.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pretrain_satformer

DATA = ("--data-path", "--data-args-path", "--per-split-data-args-path", "--mock-data")
VOCABULARY = "--tokenizer-type NullTokenizer --vocab-size 31999"  # and its end of document


def complete(flags: list[str]) -> list[str]:
    """A command line of pretrain_satformer.py that plans.

    Args:
        flags: as given.
    """
    named = {flag.partition("=")[0] for flag in flags}
    added = ["--dry-run"] * ("--dry-run" not in named)
    if not named & {*DATA, "--train-data-path"}:
        added.append("--mock-data")
    if "--tokenizer-type" not in named:
        added += VOCABULARY.split()
    return [*flags, *added]


if __name__ == "__main__":
    sys.argv[1:] = complete(sys.argv[1:])
    pretrain_satformer.main()
