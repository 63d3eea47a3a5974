"""From a loaded model and a text to a folder: numbers, pictures, the page, what was claimed."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_satformer.analysis.gates.ablations import run_ablations
from megatron_satformer.analysis.gates.access import as_packaged, build_grid
from megatron_satformer.analysis.gates.categories import find_frequencies
from megatron_satformer.analysis.gates.claims import Claim, judge_claims
from megatron_satformer.analysis.gates.effects import build_effects, over_cells
from megatron_satformer.analysis.gates.figures import draw_heat_map
from megatron_satformer.analysis.gates.inputs import Inputs, Opened, fit_inputs
from megatron_satformer.analysis.gates.measure import (
    Baseline,
    Measured,
    batches,
    find_baseline,
    read_prompts,
    read_text,
)
from megatron_satformer.analysis.gates.page import write_page
from megatron_satformer.analysis.gates.plan import Plan
from megatron_satformer.analysis.gates.sums import find_interval
from megatron_satformer.analysis.gates.texts import build_texts
from megatron_satformer.files.atomic import write_atomically

MARKER = "gates.json"
EDGE_TOKENS = 4096  # by whose losses tokens are parted into fifths


def analyze(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    opened: Opened,
    folder: Path,
    about: dict[str, Any],
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Analyzes a model and writes everything.

    Args:
        model: Causal language model of transformers, in evaluation mode.
        tokenizer: Its tokenizer.
        plan: What to analyze.
        opened: From `open_inputs`.
        folder: Where to write.
        about: What `gates.json` is to say of the model.
        tell: Prints a line.

    Returns:
        What `gates.json` holds.

    Raises:
        ValueError: If the model has nothing to analyze, or cannot read the inputs.
    """
    model = as_packaged(model)
    inputs = fit_inputs(plan, model.config, opened)
    if inputs.sets and not getattr(tokenizer, "is_fast", False):
        raise ValueError("tokenizer must be a fast one for --retrieval: where its tokens stand.")
    length = inputs.seq_length
    first = next(batches(inputs.held_out, length, length))
    grid = build_grid(model, first.to(model.device))
    edges = max(length, min(plan.ablation_tokens or EDGE_TOKENS, plan.max_tokens))
    baseline = find_baseline(model, grid, list(batches(inputs.held_out, length, edges)))
    measured = Measured(grid, tokenizer, sorted({one.task for one in inputs.sets}))
    counted = inputs.counted if inputs.counted.size else inputs.held_out
    frequencies = find_frequencies(counted, model.config.vocab_size)
    ids = batches(inputs.held_out, length, plan.max_tokens)
    read_text(model, measured, ids, frequencies, baseline.edges, tell)
    limit = plan.retrieval_limit
    read_prompts(model, tokenizer, measured, inputs.sets, limit, tell)
    result = {**about, **_describe(model, measured, baseline, inputs)}
    if plan.ablation_tokens:
        result["ablations"] = run_ablations(
            model, tokenizer, grid, baseline, inputs.sets, limit, tell
        )
    claims = judge_claims(measured) if grid.gate else []
    result["claims"] = [asdict(claim) | {"sentence": claim.sentence} for claim in claims]
    count = plan.texts if grid.dynamic else 0
    sets = inputs.sets if count else []
    texts = build_texts(model, tokenizer, grid, inputs.held_out, count, sets)
    _write(folder, result, measured, claims, texts)
    for claim in claims:
        tell(claim.sentence)
    return result


def _describe(model: Any, measured: Measured, baseline: Baseline, inputs: Inputs) -> dict[str, Any]:
    """Everything that was measured, as JSON takes it."""
    grid, cells = measured.grid, measured.cells
    present = grid.present.numpy()
    zeros = over_cells(measured.zeros.means()[:, 0], present)
    low, high = find_interval(zeros[1:])

    def kept(values: npt.NDArray) -> list[list[float | None]]:
        return [
            [float(v) if there else None for v, there in zip(row, where, strict=True)]
            for row, where in zip(values, present, strict=True)
        ]

    entropy = cells.entropy()
    dead = (cells.zeros == cells.tokens) & present
    places = [(r, c) for r, c in np.argwhere(present).tolist()]
    told = {
        "architecture": model.config.architecture,
        "value": grid.value,
        "gates": grid.gate,
        "by_token": grid.dynamic,
        "tokens": measured.tokens,
        "sequences": measured.zeros.sequences,
        "seq_length": inputs.seq_length,
        "loss_edges": baseline.edges.tolist(),
        "rows": grid.rows,
        "columns": grid.columns,
        "mean": kept(cells.mean()),
        "deviation": kept(cells.deviation()),
        "zeros": kept(cells.zeros / cells.tokens),
        "quantiles": {f"{q:g}": kept(v) for q, v in cells.quantiles().items()},
        "entropy": kept(entropy),
        "entropy_of_uniform": float(np.log(measured.tokens)),
        "exact_zeros": {
            "share": float(zeros[0]),
            "low": low,
            "high": high,
            "at_initialisation": grid.zeros_at_start,
        },
        "dead": [[grid.rows[r], grid.columns[c]] for r, c in np.argwhere(dead).tolist()],
    }
    if grid.dynamic:
        told["categories"] = build_effects(measured)
        told["opened_most"] = [
            {"row": grid.rows[r], "column": grid.columns[c], "tokens": measured.highest.best(r, c)}
            for r, c in places
        ]
    return told


def _write(
    folder: Path,
    result: dict[str, Any],
    measured: Measured,
    claims: list[Claim],
    texts: list[Any],
) -> None:
    grid, value = measured.grid, measured.grid.value
    model, tokens = result["architecture"], f"{measured.tokens:,} tokens of held-out text"

    def array(name: str) -> npt.NDArray:
        return np.array(result[name], dtype=float)

    signed = bool((np.nan_to_num(array("mean")) < 0).any())
    across = "KV head" if grid.gate else "source"
    title = f"{model}: mean {value} on {tokens}"
    shape = grid.rows, grid.columns
    draw_heat_map(folder / "mean.png", array("mean"), *shape, title, value, across, signed)
    if grid.gate:
        title, share = f"{model}: gates that are exactly 0, on {tokens}", 100 * array("zeros")
        draw_heat_map(folder / "zeros.png", share, *shape, title, "share of tokens (%)", across)
    if grid.dynamic:
        table = result["categories"]
        names = [f"{e['group']}: {e['category']}" for e in table]
        rows = np.array([e["by_row"] for e in table]).T
        title, size = f"{model}: mean |{value}| by category of token", f"|{value}|"
        draw_heat_map(folder / "categories.png", rows, grid.rows, names, title, size, "category")
    notes = [claim.sentence for claim in claims]
    if not grid.dynamic:
        notes.append("The weights are the same for every token: see mean.png and gates.json.")
    summary = {"rows": grid.rows, "columns": grid.columns, "value": value, "notes": notes}
    write_page(folder / "gates.html", f"{model}: {value} by token", summary, texts)
    content = json.dumps(_finite(result), indent=1, allow_nan=False) + "\n"
    write_atomically(folder / MARKER, content.encode())


def _finite(value: Any) -> Any:
    """The same with None for numbers that are none."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
