"""What a made-up model's gates did, for tests."""

from types import SimpleNamespace

import numpy as np
import torch

from megatron_satformer.analysis.gates.access import Grid, Point
from megatron_satformer.analysis.gates.categories import GROUPS
from megatron_satformer.analysis.gates.measure import Measured
from megatron_satformer.checkpoint.exported.modeling_access import LearnedAccess

TOKENIZER = SimpleNamespace(
    all_special_ids=[], encode=lambda text, **_: [0], decode=lambda ids, **_: "a" * len(ids)
)


def build_grid(layers: int, heads: int) -> Grid:
    """Of gates."""
    names = [str(n + 1) for n in range(heads)]
    points = [
        Point(LearnedAccess(["V1"], names, gate=True, zeros=0.5), row, False)
        for row in range(layers)
    ]
    return Grid(
        points=points,
        rows=[str(n + 2) for n in range(layers)],
        columns=names,
        cells=[torch.arange(heads)] * layers,
        layers=[n + 2 for n in range(layers)],
        present=torch.ones(layers, heads, dtype=torch.bool),
        gate=True,
        dynamic=True,
    )


def build_measured(
    values: np.ndarray, prompts: np.ndarray | None = None, **categories: np.ndarray
) -> Measured:
    """Of text and prompts of one task, whose last token is an answer; [b, s, layers, heads]."""
    grid = build_grid(*values.shape[2:])
    measured = Measured(grid, TOKENIZER, [] if prompts is None else ["mqar"])
    shape = values.shape[:2]
    codes = {group: np.full(shape, -1) for group in GROUPS} | categories
    measured.add_text(np.zeros(shape, np.int64), values, codes)
    if prompts is not None:
        answering = np.zeros(prompts.shape[:2], bool)
        answering[:, -2] = True
        lengths = np.full(len(prompts), prompts.shape[1])
        measured.add_prompts("mqar", prompts, lengths, answering)
    return measured
