"""The quickstart as one call."""

import os
from dataclasses import replace
from pathlib import Path

from megatron_satformer.quickstart.console import (
    Console,
    format_seconds,
    format_size,
    format_table,
)
from megatron_satformer.quickstart.folder import RunFolder
from megatron_satformer.quickstart.recipe import Recipe
from megatron_satformer.quickstart.runner import run_steps
from megatron_satformer.quickstart.stamps import list_files
from megatron_satformer.quickstart.steps import build_steps

MADE = {
    "corpus": "the text, one JSON line per scene or section",
    "tokenizer": "SentencePiece model and its readable vocabulary",
    "data": "token ids for Megatron (.bin, .idx)",
    "checkpoints": "Megatron checkpoints: weights, optimizer, schedule",
    "tensorboard": "event files: tensorboard --logdir on this folder",
    "train.log": "everything that Megatron printed",
    "hf": "the model for transformers (trust_remote_code=True)",
    "samples.txt": "generated text",
    "loss.png": "training and validation loss",
    "gates.png": "mean gate, and share of exact zeros, per layer and head",
    "gates.json": "the same as numbers",
    "summary.json": "sizes, losses, speed, seconds",
}


def run_quickstart(output: str, fresh: bool = False, train_iters: int | None = None) -> int:
    """Runs what is missing of the quickstart and tells what was made.

    Args:
        output: Folder of the run.
        fresh: Whether to remove an earlier run in it first.
        train_iters: Number of training steps, if not the recipe's.

    Returns:
        The exit code.

    Raises:
        ValueError: If an option is bad, or the folder is not ours to write to.
    """
    recipe = Recipe()
    if train_iters is not None:
        if train_iters < 4:
            raise ValueError(f"train_iters ({train_iters}) must be at least 4.")
        recipe = replace(recipe, train_iters=train_iters)
    folder = RunFolder(output, fresh)
    console = Console()
    shown = os.path.relpath(folder.root)
    shown = os.fspath(folder.root) if shown.startswith("..") else shown
    console.line(f"Quickstart: corpus to trained, exported and sampled SATFormer, in {shown}/", 0)
    code = run_steps(build_steps(recipe), folder, console)
    if code == 0:
        console.line()
        for line in _table(folder.root, shown):
            console.line(line, 0)
        console.line()
        console.line(f"Done in {format_seconds(console.elapsed)}.", 0)
    return code


def _table(root: Path, shown: str) -> list[str]:
    rows: list[tuple[str, ...]] = [("file", "size", "what it is")]
    for name, what in MADE.items():
        path = root / name
        size = sum(file.stat().st_size for file in list_files(root, [name]))
        rows.append((f"{shown}/{name}{'/' * path.is_dir()}", format_size(size), what))
    return format_table(rows)
