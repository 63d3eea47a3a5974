"""What variants are trained on, and how a trained one is measured."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_satformer.analysis.unigram import read_splits
from megatron_satformer.comparison.trials import CHECKPOINTS
from megatron_satformer.data.tokenizers.decoding import text_of
from megatron_satformer.data.tokenizers.exact import build_tokenizer
from megatron_satformer.data.tokenizers.options import TokenizerOptions
from megatron_satformer.files.metrics_file import read_metrics
from megatron_satformer.quickstart.process import REPOSITORY

TEXT = "text"


@dataclass(frozen=True)
class Task:
    """Data to train on.

    Attributes:
        name: `text`, or a retrieval task.
        flags: of pretrain_satformer.py, that name data and tokenizer.
        bytes_per_token: of the validation text; None where bits per byte mean nothing.
        retrieval: folder of tools/make_retrieval_data.py to evaluate with, if any.
    """

    name: str
    flags: tuple[str, ...]
    bytes_per_token: float | None = None
    retrieval: Path | None = None

    def measure(self, folder: Path) -> dict[str, Any]:
        """Measures a trial that has been trained, by its folder; keeps its last checkpoint alone.

        Returns:
            `loss` (nats per token of the validation data that count), `bits_per_byte` and
            `accuracy` (share of answers that are right) where the task has them.
        """
        records = read_metrics(folder / CHECKPOINTS / "metrics.jsonl")
        final = [r["lm_loss"] for r in records if r["split"] == "final validation"]
        if not final:
            raise ValueError(f"{folder} must have a final validation. Remove it, and run again.")
        measured = {"loss": final[-1]}
        if self.bytes_per_token:
            measured["bits_per_byte"] = final[-1] / math.log(2) / self.bytes_per_token
        if self.retrieval is not None:
            measured |= _retrieval(folder, self.retrieval, self.name)
        steps = sorted((folder / CHECKPOINTS).glob("iter_*"))
        for older in steps[:-1]:
            shutil.rmtree(older)
        return measured


def text_task(data_path: str, tokenizer_type: str, tokenizer_model: str, split: str) -> Task:
    """Language modelling on a tokenized corpus.

    Args:
        data_path: prefix of the data set, without .bin.
        tokenizer_type: Megatron's.
        tokenizer_model: its file or folder.
        split: as --split has it.
    """
    flags = ["--data-path", data_path, "--split", split]
    flags += ["--tokenizer-type", tokenizer_type, "--tokenizer-model", tokenizer_model]
    tokens = read_splits(data_path, split)["valid"]
    tokenizer = build_tokenizer(TokenizerOptions(tokenizer_type, tokenizer_model))
    ends = tokens == tokenizer.eod
    text = text_of(tokenizer, tokens[~ends])
    return Task(TEXT, tuple(flags), len(text.encode()) / tokens.size)


def retrieval_task(name: str, data: Path, length: int, seq_length: int) -> Task:
    """A task that tools/make_retrieval_data.py has made, with a tokenizer of its own words.

    Args:
        name: of the task.
        data: its folder.
        length: tokens of an example; several in a sample do not see each other.
        seq_length: tokens of a sample.
    """
    flags = ["--use-loss-masks", "--tokenizer-type", "HuggingFaceTokenizer"]
    if length < seq_length:
        flags += ["--reset-attention-mask", "--reset-position-ids"]
    flags += ["--tokenizer-model", str(data / "tokenizer")]
    for split in ("train", "valid", "test"):
        flags += [f"--{split}-data-path", str(data / split / f"{name}_{length}")]
    return Task(name, tuple(flags), retrieval=data)


def _retrieval(folder: Path, data: Path, name: str) -> dict[str, Any]:
    target = folder / "retrieval.json"
    flags: Sequence[str] = ["--load", str(folder / CHECKPOINTS), "--data", str(data)]
    command = [sys.executable, "tools/evaluate_retrieval.py", *flags, "--tasks", name]
    done = subprocess.run(
        [*command, "--save", str(target)], cwd=REPOSITORY, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"{folder} could not be evaluated: {done.stderr.strip()[-2000:]}")
    found: Mapping[str, Any] = json.loads(target.read_text())
    return {"accuracy": _overall(found["tasks"])}


def _overall(tasks: Any) -> float:
    """Exact match over all answers of all that was evaluated."""
    scores = [score["all"] for by_length in tasks.values() for score in by_length.values()]
    answers = sum(score["answers"] for score in scores)
    return sum(score["exact_match"] * score["answers"] for score in scores) / answers
