"""Gates of real training runs: the same figures in every layout, and those of the gates."""

import pytest

from megatron_satformer.files.metrics_file import read_metrics
from tests.small import PP2, RTOL, SHAPE, SP, TP2

RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def gates_of(run):
    records = read_metrics(run.tensorboard / "metrics.jsonl")
    return {r["step"]: r for r in records if r["split"] == "gates"}


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, PP2),
        pytest.param(4, f"{TP2} {PP2} {SP}", marks=pytest.mark.slow),
        (
            2,
            f"{TP2} {RECOMPUTE}",
        ),
    ],
)
def test_every_layout_tells_the_same(started, pretrain, ranks, layout):
    flags, _ = started("satformer")
    flags = [*flags, "--log-gates-interval", 2]
    one, split = gates_of(pretrain(1, *flags)), gates_of(pretrain(ranks, *flags, *layout.split()))
    assert list(one) == list(split) == [2, 4]
    for step, record in one.items():
        for name in ("alpha_mean", "alpha_zeros"):
            assert list(record[name]) == ["2", "3", "4"]  # layer 1 makes V1
            assert split[step][name] == pytest.approx(record[name], rel=RTOL, abs=1e-3)
        assert split[step]["alpha_dead"] == record["alpha_dead"]
    assert len({str(record["alpha_mean"]) for record in one.values()}) == 2


@pytest.mark.parametrize(
    ("gate", "mean", "zeros"),
    [
        ("relu", (0.01, 1), (0.3, 0.7)),
        ("sigmoid", (0.45, 0.55), (0, 0)),
        ("softmax", (1, 1), (0, 0)),
    ],
)
def test_figures_are_those_of_the_gate(pretrain, data_flags, gate, mean, zeros):
    """Logits start around 0: of a layer's four heads about as often below it as above."""
    flags = [*SHAPE, *data_flags, "--train-iters", 1, "--value-gate", gate]
    run = pretrain(1, *flags, "--log-gates-interval", 1)
    (record,) = gates_of(run).values()
    for name, (least, most) in (("alpha_mean", mean), ("alpha_zeros", zeros)):
        for layer, value in record[name].items():
            assert least - 1e-5 <= value <= most + 1e-5
            board = run.scalars(f"{name.replace('_', ' ')}/layer {layer}")
            assert board == {1: pytest.approx(value)}


def test_heads_that_are_shut_for_every_token_are_dead(pretrain, data_flags):
    """A bias far below 0 shuts all heads of the layers that mix, whichever rank has them."""
    flags = [*SHAPE, *data_flags, "--train-iters", 1, "--log-gates-interval", 1]
    flags += ["--value-gate-bias", "--value-gate-bias-init", -100, *TP2.split()]
    (record,) = gates_of(pretrain(2, *flags)).values()
    assert record["alpha_dead"] == {"2": 4, "3": 4, "4": 4}


def test_an_architecture_without_gates_is_refused(pretrain, data_flags):
    flags = [*SHAPE, *data_flags, "--train-iters", 1, "--log-gates-interval", 1]
    run = pretrain(1, *flags, "--architecture", "resformer", code=2)
    assert "log_gates_interval (1) must not be given with architecture (resformer)" in run.output


def test_no_interval_is_refused(pretrain, data_flags):
    flags = [*SHAPE, *data_flags, "--train-iters", 1, "--log-gates-interval", 0]
    run = pretrain(1, *flags, code=2)
    assert "log_gates_interval (0) must be at least 1 step." in run.output
