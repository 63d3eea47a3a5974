"""results.json and report.html, which needs no network: figures are in it."""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_satformer.comparison.figures import draw_all
from megatron_satformer.comparison.statistics import (
    CONFIDENCE,
    compare,
    conclude,
    noise_rate,
)
from megatron_satformer.files.atomic import write_atomically

METRICS = {"loss": "validation loss", "accuracy": "accuracy"}
STYLE = """body{font:15px/1.5 sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px;margin:1em 0}td,th{border:1px solid #ccc;
padding:3px 8px;text-align:right}td:first-child,th:first-child{text-align:left}
img{max-width:100%}pre{background:#f4f4f4;padding:.7em;overflow:auto}
.lower,.higher{font-weight:bold}"""


def add_comparisons(results: dict[str, Any], baselines: Sequence[str]) -> None:
    """Adds to every task the paired differences of its variants from each baseline.

    Args:
        results: as `Comparison.run` returns them.
        baselines: names of variants.
    """
    for task, found in results["tasks"].items():
        made = []
        for baseline in baselines:
            for name in found:
                if name == baseline:
                    continue
                for metric, what in METRICS.items():
                    one, other = _metric(found[name], metric), _metric(found[baseline], metric)
                    if not one or not other:
                        continue
                    difference = compare(one, other)
                    made.append(
                        {
                            "variant": name,
                            "baseline": baseline,
                            "metric": metric,
                            **vars(difference),
                            "verdict": difference.verdict,
                            "told": conclude(name, baseline, f"{task}, {what}", difference),
                        }
                    )
        results.setdefault("comparisons", {})[task] = made


def write_report(results: dict[str, Any], folder: Path, command: str) -> list[Path]:
    """Writes results.json, the figures and report.html; returns their paths.

    Args:
        results: with comparisons.
        folder: where they go.
        command: what made them.
    """
    figures = draw_all(results, folder)
    data, page = folder / "results.json", folder / "report.html"
    write_atomically(data, (json.dumps(results | {"command": command}, indent=1) + "\n").encode())
    write_atomically(page, _page(results, figures, command).encode())
    return [data, page, *figures]


def _metric(variant: dict[str, Any], metric: str) -> dict[int, float]:
    return {int(seed): run[metric] for seed, run in variant["seeds"].items() if metric in run}


def _page(results: dict[str, Any], figures: Sequence[Path], command: str) -> str:
    options, machine = results["options"], results["machine"]
    parts = [
        "<h1>Cross-layer access on equal terms</h1>",
        f"<p>Size {options['size']}, {options['steps']} steps, {options['seeds']} seeds. Every "
        "variant saw the same tokens in the same order; its learning rate is the one of the grid "
        "with the lowest validation loss at the first seed.</p>",
        f"<pre>{html.escape(command)}</pre>",
        "<p>" + ", ".join(f"{k} {html.escape(str(v))}" for k, v in machine.items()) + "</p>",
        "<h2>What can be concluded</h2>",
        f"<p>{html.escape(_caution(options['seeds']))}</p>",
    ]
    for made in results["comparisons"].values():
        parts.append("<ul>" + "".join(f"<li>{html.escape(c['told'])}</li>" for c in made) + "</ul>")
    for task, found in results["tasks"].items():
        parts += [f"<h2>{html.escape(task)}</h2>", _table(found), _grid(found), _dead(found)]
    if results.get("cost"):
        parts += ["<h2>Cost</h2>", _cost(results["cost"])]
    for figure in figures:
        content = base64.b64encode(figure.read_bytes()).decode()
        parts.append(f'<img alt="{figure.stem}" src="data:image/png;base64,{content}">')
    parts += ["<h2>Variants</h2>", _rows(["variant", "flags"], results["variants"].items())]
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Comparison</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def _caution(seeds: int) -> str:
    if seeds < 2:
        return "One seed shows nothing about a difference between variants."
    return (
        f"Differences are paired by seed; the {CONFIDENCE:.0%} interval is a bootstrap over "
        f"{seeds} seeds. With so few it is close to their range: of differences that are pure "
        f"noise {noise_rate(seeds):.0%} would be called shown. Nothing here is about larger "
        "models or longer training."
    )


def _table(found: dict[str, Any]) -> str:
    metrics = [
        metric
        for metric in ("loss", "bits_per_byte", "accuracy")
        if all(metric in run for v in found.values() for run in v["seeds"].values())
    ]
    rows = []
    for name, variant in found.items():
        row = [name, f"{variant['lr']:g}"]
        for metric in metrics:
            values = [run[metric] for run in variant["seeds"].values()]
            mean = sum(values) / len(values)
            row.append(f"{mean:.4f} ({min(values):.4f} to {max(values):.4f})")
        rows.append(row)
    heads = ["variant", "learning rate", *(f"{m.replace('_', ' ')} (range)" for m in metrics)]
    return _rows(heads, rows)


def _grid(found: dict[str, Any]) -> str:
    rates = list(next(iter(found.values()))["grid"])
    rows = [[name, *(f"{v['grid'][rate]:.4f}" for rate in rates)] for name, v in found.items()]
    return "<p>Loss by learning rate, first seed:</p>" + _rows(["variant", *rates], rows)


def _dead(found: dict[str, Any]) -> str:
    rows = []
    for name, variant in found.items():
        runs = [[count for _, count in run["dead"]] for run in variant["seeds"].values()]
        if all(runs):
            ends = [counts[-1] for counts in runs]
            mean, most = sum(ends) / len(ends), max(max(counts) for counts in runs)
            rows.append([name, f"{mean:.2f} ({min(ends):.2f} to {max(ends):.2f})", f"{most:.2f}"])
    if not rows:
        return ""
    told = "<p>Dead KV heads of a layer: those whose gate is 0 at every token of a step.</p>"
    return told + _rows(["variant", "at the end (range)", "most at any step"], rows)


def _cost(cost: dict[str, Any]) -> str:
    rows = [
        [
            row["architecture"],
            f"{row['median_ms']:.1f}",
            f"{row['step_time_ratio']:.3f}",
            f"{row['peak_mib']:.1f}",
            f"{row['peak_memory_ratio']:.3f}" if row["peak_memory_ratio"] else "",
        ]
        for row in cost["measured"]
    ]
    heads = ["variant", "step (ms)", "ratio", "peak memory (MiB)", "ratio"]
    return f"<p>{html.escape(cost['device'])}, interleaved</p>" + _rows(heads, rows)


def _rows(heads: Sequence[str], rows: Any) -> str:
    top = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"
