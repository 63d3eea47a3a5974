"""The text and the prompts that are read, checked before anything is computed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from megatron_satformer.analysis.gates.plan import Plan
from megatron_satformer.analysis.retrieval.accuracy import TestSet, find_test_sets
from megatron_satformer.analysis.unigram import read_splits

LONGEST = 1024  # of a sequence, where none is asked for
Opened = tuple[npt.NDArray, npt.NDArray, list[TestSet]]


@dataclass(frozen=True)
class Inputs:
    """What is read.

    Attributes:
        counted: Tokens whose counts say what is rare.
        held_out: Tokens that are analyzed.
        seq_length: Tokens of a sequence.
        sets: Retrieval tasks that the model is long enough for.
    """

    counted: npt.NDArray
    held_out: npt.NDArray
    seq_length: int
    sets: list[TestSet]


def open_inputs(plan: Plan) -> Opened:
    """Tokens to count, tokens to analyze, and retrieval tasks; before any model is loaded.

    Raises:
        ValueError: If one is not there.
    """
    sets = []
    if plan.retrieval is not None:
        sets = find_test_sets(Path(plan.retrieval), option="retrieval")
    if plan.split is None:
        tokens = read_splits(plan.data, "1,0,0")["train"]
        return tokens, tokens, sets
    splits = read_splits(plan.data, plan.split)
    if not splits["valid"].size:
        raise ValueError(
            f"split ({plan.split}) must leave validation a document of {plan.data}. Give it a "
            "larger share."
        )
    return splits["train"], splits["valid"], sets


def fit_inputs(plan: Plan, config: Any, opened: Opened) -> Inputs:
    """What was opened, as the model can read it.

    Raises:
        ValueError: If it cannot.
    """
    counted, held_out, sets = opened
    longest = config.max_position_embeddings
    length = plan.seq_length or min(longest, LONGEST)
    if length > longest:
        raise ValueError(f"seq_length ({length}) must be at most {longest}, the model's.")
    tokens = min(held_out.size, plan.max_tokens)
    if tokens < length:
        raise ValueError(
            f"seq_length ({length}) must be at most the tokens to read ({tokens}). Give a shorter "
            "one, or more text or --max-tokens."
        )
    highest = int(held_out[:tokens].max())
    if highest >= config.vocab_size:
        raise ValueError(
            f"data ({plan.data}) must be in the model's tokens ({config.vocab_size}), and has "
            f"token {highest}. Give the data that it was trained on, or its like."
        )
    fitting = [one for one in sets if one.length <= longest]
    if sets and not fitting:
        raise ValueError(
            f"retrieval ({plan.retrieval}) must have examples of at most {longest} tokens, the "
            f"model's; the shortest have {min(one.length for one in sets)}."
        )
    return Inputs(counted, held_out, length, fitting)
