"""Parameters with a learning rate and decay of their own have them, also after a resume."""

import inspect
import json
import math

import pytest
from megatron.training import training

from tests.small import DO, PP2, SHAPE, SP, TP2

FLAGS = [*SHAPE, *"--mock-data --tokenizer-type NullTokenizer --vocab-size 127".split()]
FLAGS += "--architecture lime --train-iters 6 --save-interval 3".split()
ROUTERS = 4**2 * (2 + 3 + 4)  # numbers, over all ranks
SLOW = pytest.mark.slow


@pytest.fixture
def recorded(zygote, tmp_path):
    """The groups of every step, each a dictionary with the numbers of all ranks added up."""

    def run(name, ranks, *flags):
        argv = [*FLAGS, "--save", str(tmp_path / "saved"), *flags]
        path = tmp_path / name
        job = zygote.run(ranks, call="tests.backend.groups:record", args=[str(path), argv])
        assert job.codes == [0] * ranks, job.output[-6000:]
        of_ranks = [json.loads(path.with_suffix(f".{n}").read_text()) for n in range(ranks)]
        return [
            [
                {**same[0], "numbers": sum(group["numbers"] for group in same)}
                for same in zip(*groups, strict=True)
            ]
            for groups in zip(*of_ranks, strict=True)
        ]

    return run


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(1, "", marks=SLOW),
        pytest.param(2, DO, marks=SLOW),
        pytest.param(2, f"{TP2} {SP}", marks=SLOW),
        pytest.param(4, f"{TP2} {PP2} --bf16", marks=SLOW),
    ],
)
@pytest.mark.parametrize("factor", [10.0, pytest.param(0.5, marks=SLOW)])
def test_every_step_has_them_before_and_after_a_resume(recorded, tmp_path, ranks, layout, factor):
    flags = [*layout.split(), "--lime-router-lr-mult", str(factor)]
    steps = recorded("first", ranks, *flags, "--exit-interval", "3")
    steps += recorded("second", ranks, *flags, "--load", str(tmp_path / "saved"))
    assert len(steps) == 6
    rates = []
    for groups in steps:
        (routers,) = (group for group in groups if group["numbers"] == ROUTERS)
        trunk = [group for group in groups if group is not routers]
        (lr,) = {group["lr"] for group in trunk}
        assert routers["lr"] == pytest.approx(factor * lr)
        assert routers["weight_decay"] == 0
        assert {group["weight_decay"] for group in trunk} == {0, 0.1}
        rates.append(lr)
    assert rates[0] == pytest.approx(3e-3)
    assert sorted(rates, reverse=True) == rates
    assert len(set(rates)) == 6


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "layout"), [(1, ""), (2, DO)])
def test_another_rate_on_a_resume_reaches_every_group(recorded, tmp_path, ranks, layout):
    """The optimizer finds the groups of its state by the rates that they were saved with."""
    recorded("first", ranks, *layout.split(), "--exit-interval", "3")
    given = ["--load", str(tmp_path / "saved"), "--override-opt-param-scheduler", "--lr", "1e-3"]
    steps = recorded("second", ranks, *layout.split(), *given)
    assert len(steps) == 3
    for done, groups in enumerate(steps, 3):
        (routers,) = (group for group in groups if group["numbers"] == ROUTERS)
        (lr,) = {group["lr"] for group in groups if group is not routers}
        assert lr == pytest.approx(3e-4 + 7e-4 * (1 + math.cos(math.pi * done / 6)) / 2)
        assert routers["lr"] == pytest.approx(10 * lr)


def test_megatron_still_asks_by_that_name():
    source = inspect.getsource(training.setup_model_and_optimizer)
    assert "config, config_overrides = get_megatron_optimizer_config(args)" in source
