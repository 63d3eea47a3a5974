import re

import pytest

from megatron_satformer.analysis import run_plots
from megatron_satformer.analysis.run_plots import plot_runs
from megatron_satformer.files.metrics_file import MetricsFile


@pytest.fixture
def drawn(monkeypatch):
    """The axes, as they are when the figure is closed."""
    figures = []
    close = run_plots.plt.close
    monkeypatch.setattr(run_plots.plt, "close", lambda f: (figures.append(f), close(f)))
    return figures


@pytest.fixture
def runs(tmp_path):
    """Two runs, the first with an evaluation and in its third step, which is not
    logged, and without a loss in its fourth."""
    for name, loss, evaluated in (("a/checkpoints", 5.0, 4.5), ("b", 6.0, None)):
        file = MetricsFile(tmp_path / name / "metrics.jsonl", 0)
        for step in (1, 2, 4):
            value = loss / step if step < 4 or name == "b" else float("nan")
            given = {"step": step, "split": "train", "tokens": 512 * step, "lm_loss": value}
            file.write(given | {"seconds_per_step": 1800.0})
        if evaluated:
            file.write({"step": 3, "split": "validation", "lm_loss": evaluated})
    return tmp_path


@pytest.mark.parametrize(
    ("x", "places"), [("step", [1, 2, 4]), ("tokens", [512, 1024, 2048]), ("hours", [0.5, 1, 2])]
)
def test_runs_lie_on_top_of_each_other(runs, drawn, x, places):
    names = [str(runs / "a/checkpoints"), f"other={runs / 'b' / 'metrics.jsonl'}"]
    counts = plot_runs(names, str(runs / "out/loss.png"), x=x)
    assert counts == {"a": 2, "a, validation": 1, "other": 3}
    curves = {line.get_label(): line for line in drawn[0].axes[0].lines}
    assert [list(values) for values in curves["a"].get_data()] == [places[:2], [5.0, 2.5]]
    assert [list(v) for v in curves["a, validation"].get_data()] == [[sum(places[1:]) / 2], [4.5]]
    assert [list(v) for v in curves["other"].get_data()] == [places, [6.0, 3.0, 1.5]]
    assert curves["a"].get_color() == curves["a, validation"].get_color()
    assert curves["a"].get_color() != curves["other"].get_color()
    assert (runs / "out/loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "flags", "told"),
    [
        (["nowhere"], {}, "runs (nowhere) must be folders of --save or --tensorboard-dir"),
        (["b"], {"metric": "accuracy"}, "metric (accuracy) must be a number that b/metrics.jsonl "),
        (["b"], {"metric": "accuracy"}, "It has lm_loss, seconds_per_step."),
        (["b", "b"], {}, "runs (b) must have names of their own."),
    ],
)
def test_bad_input_draws_nothing(runs, monkeypatch, given, flags, told):
    monkeypatch.chdir(runs)
    with pytest.raises(ValueError, match=re.escape(told)):
        plot_runs(given, "loss.png", **flags)
    assert not (runs / "loss.png").exists()
