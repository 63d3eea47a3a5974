"""Exact match of a model on retrieval tasks, by task, length and depth.

One pass over the whole text says for every token of an answer whether it is the likeliest, given
the true text before it. All of them are exactly where greedy decoding gives the answer, so that
this is exact match (and lm_eval's `acc`) without generating, for all answers of a text at once.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_satformer.analysis.retrieval.examples import Example
from megatron_satformer.analysis.retrieval.files import MARKER
from megatron_satformer.analysis.retrieval.tasks import TASKS

Z = 1.96  # of a normal distribution's middle 95%
DEPTHS = 4  # bins of depths that were not asked for


@dataclass(frozen=True)
class Answered:
    """One answer of a model: whether it is right to the last token, its loss in nats, its depth."""

    right: bool
    loss: float
    depth: float | None


@dataclass(frozen=True)
class Score:
    """Exact match over answers.

    Attributes:
        exact_match: Share that is right.
        low: Of the 95% interval (Wilson's).
        high: Likewise.
        loss: Mean loss of an answer, nats.
        answers: Number of them.
    """

    exact_match: float
    low: float
    high: float
    loss: float
    answers: int


def score(answers: Sequence[Answered]) -> Score:
    """Returns the exact match of answers, at least one."""
    count = len(answers)
    share = sum(one.right for one in answers) / count
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z * math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2) / (1 + Z * Z / count)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Score(share, low, high, sum(one.loss for one in answers) / count, count)


@dataclass(frozen=True)
class TestSet:
    """The test examples of one task and length."""

    task: str
    length: int
    file: Path

    def examples(self, limit: int | None = None) -> Iterator[Example]:
        """The first `limit` examples."""
        with self.file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if limit is not None and number >= limit:
                    break
                row = json.loads(line)
                yield Example(tuple(row["parts"]), tuple(row["depths"]))


def find_test_sets(
    data: Path,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    option: str = "data",
) -> list[TestSet]:
    """Finds the test sets of a folder, in the order of task and length.

    Args:
        data: Made by tools/make_retrieval_data.py.
        tasks: Those wanted; None for all.
        lengths: Likewise.
        option: Name of `data` in messages.

    Raises:
        ValueError: If it is no such folder, or holds none of what is wanted.
    """
    if not (data / MARKER).is_file():
        raise ValueError(
            f"{option} ({data}) must be a folder made by tools/make_retrieval_data.py: it has no "
            f"{MARKER}."
        )
    found = []
    for file in (data / "lm_eval" / "data").glob("*.jsonl"):
        task, _, length = file.stem.rpartition("_")
        found.append(TestSet(task, int(length), file))
    for what, wanted, there in (
        ("tasks", tasks, {one.task for one in found}),
        ("lengths", lengths, {one.length for one in found}),
    ):
        for value in wanted or ():
            if value not in there:
                told = ", ".join(map(str, sorted(there))) or "none"
                raise ValueError(f"{what} ({value}) must be there to be tested: {told}.")
    chosen = [
        one
        for one in found
        if (not tasks or one.task in tasks) and (not lengths or one.length in lengths)
    ]
    if not chosen:
        raise ValueError(f"{option} ({data}) holds no test examples of these tasks and lengths.")
    return sorted(chosen, key=lambda one: (one.task, one.length))


@dataclass(frozen=True)
class Encoded:
    """Examples as tokens.

    Attributes:
        ids: [examples, tokens]; what follows a text is 0.
        lengths: Tokens of each.
        spans: Of each answer, its example, its tokens and its depth.
    """

    ids: Tensor
    lengths: list[int]
    spans: list[tuple[int, range, float | None]]


def encode_examples(model: Any, tokenizer: Any, examples: Sequence[Example]) -> Encoded:
    """Turns examples into tokens.

    Args:
        model: What is to read them.
        tokenizer: Its tokenizer, a fast one.
        examples: As many as it is to read at once.

    Raises:
        ValueError: If a text is longer than the model was made for, or an answer is no whole
            number of tokens.
    """
    encoded = tokenizer([one.text for one in examples], return_offsets_mapping=True)
    longest = max(map(len, encoded.input_ids))
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and longest > most:
        raise ValueError(
            f"lengths must be at most {most}, which the model was made for; an example has "
            f"{longest} tokens. Choose shorter ones."
        )
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)  # what follows a text is not read
    spans: list[tuple[int, range, float | None]] = []
    for row, (one, tokens) in enumerate(zip(examples, encoded.input_ids, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        places = [_find_tokens(encoded.offset_mapping[row], *span) for span in one.spans()]
        spans += [(row, place, depth) for place, depth in zip(places, one.depths, strict=True)]
    return Encoded(ids, [len(tokens) for tokens in encoded.input_ids], spans)


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, examples: Sequence[Example]) -> list[Answered]:
    """Lets a model answer.

    Args:
        model: Causal language model of transformers, in evaluation mode.
        tokenizer: Its tokenizer, a fast one.
        examples: As many as it is to read at once.

    Raises:
        ValueError: As of `encode_examples`.
    """
    encoded = encode_examples(model, tokenizer, examples)
    ids, spans = encoded.ids, encoded.spans
    # the logits of the tokens before those of answers, of any row
    before = sorted({n - 1 for _, place, _ in spans for n in place})
    kept = torch.tensor(before)
    logits = model(
        ids.to(model.device), use_cache=False, logits_to_keep=kept.to(model.device)
    ).logits
    slots = {n: slot for slot, n in enumerate(before)}
    answers = []
    for row, place, depth in spans:
        true = ids[row, place.start : place.stop]
        picked = logits[row, [slots[n - 1] for n in place]].float().cpu()
        losses = torch.nn.functional.cross_entropy(picked, true, reduction="sum")
        right = bool((picked.argmax(-1) == true).all())
        answers.append(Answered(right, float(losses), depth))
    return answers


def _find_tokens(offsets: Sequence[tuple[int, int]], begin: int, end: int) -> range:
    """The tokens of characters begin to end, the first of which is a space."""
    inside = [n for n, (a, b) in enumerate(offsets) if b > begin and a < end and b > a]
    if (
        not inside
        or inside[0] == 0
        or offsets[inside[0]][0] < begin
        or offsets[inside[-1]][1] > end
    ):
        raise ValueError(
            "tokenizer must begin a token where an answer begins and end one where it ends. Use "
            "another."
        )
    return range(inside[0], inside[-1] + 1)


def evaluate_retrieval(
    model: Any,
    tokenizer: Any,
    sets: Sequence[TestSet],
    batch_size: int = 8,
    limit: int | None = None,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluates a model on test sets.

    Args:
        model: Causal language model of transformers, in evaluation mode.
        tokenizer: Its tokenizer.
        sets: From `find_test_sets`.
        batch_size: Examples at a time.
        limit: Examples of each set; None for all.
        tell: Prints a line.

    Returns:
        task -> length -> {"all": a score, "by_depth": depth in percent -> a score}.

    Raises:
        ValueError: If the tokenizer is none, or a text is too long for the model.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("tokenizer must be a fast one, which knows where its tokens stand.")
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1.")
    results: dict[str, Any] = defaultdict(dict)
    for one in sets:
        examples = list(one.examples(limit))
        answers: list[Answered] = []
        for first in range(0, len(examples), batch_size):
            answers += answer(model, tokenizer, examples[first : first + batch_size])
        overall, on_grid = score(answers), TASKS[one.task].at_depth
        results[one.task][str(one.length)] = {
            "all": asdict(overall),
            "by_depth": {
                name: asdict(score(part)) for name, part in _by_depth(answers, on_grid).items()
            },
        }
        tell(
            f"{one.task:>18} {one.length:>6} tokens  exact match {overall.exact_match:.3f} "
            f"[{overall.low:.3f}, {overall.high:.3f}]  {overall.answers} answers"
        )
    return dict(results)


def _by_depth(answers: Sequence[Answered], on_grid: bool) -> dict[str, list[Answered]]:
    """By depth in percent where it was asked for; else by quarters of the text."""
    found: dict[str, list[Answered]] = defaultdict(list)
    known = [(one.depth, one) for one in answers if one.depth is not None]
    for depth, one in sorted(known, key=lambda pair: pair[0]):
        quarter = min(DEPTHS - 1, int(depth * DEPTHS)) * 100 // DEPTHS
        name = f"{100 * depth:g}" if on_grid else f"{quarter}-{quarter + 100 // DEPTHS}"
        found[name].append(one)
    return dict(found)
