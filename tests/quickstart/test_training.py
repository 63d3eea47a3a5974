import os

import pytest

from megatron_satformer.checkpoint.megatron.reader import TRACKER
from megatron_satformer.quickstart.process import StepError
from megatron_satformer.quickstart.run import Run, Stamp
from megatron_satformer.quickstart.steps import build_steps
from megatron_satformer.quickstart.training import LAUNCH, resume_training, train
from tests.checkpoint.megatron.test_recovery import cut, weights, write_step

LINE = (
    " [2026-11-22 10:00:00] iteration {:8d}/      30 | consumed samples: 8 |"
    " elapsed time per iteration (ms): 1000.0 | lm loss: 5.0E+00 |"
)
VALID = (
    " validation loss at iteration 30 on validation set | lm loss value: 5.5E+00 | lm loss PPL: |"
)
SAVED = "  [2026-11-22] successfully saved checkpoint from iteration      10 to /x [ t 1/1 ]"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def run(tmp_path):
    """At the training step, stopped after the checkpoint of step 20."""
    run = Run(tmp_path / "run", build_steps(30))
    run.step = run.steps[3]
    (run.root / "checkpoints").mkdir()
    for step in (10, 20):
        write_step(run.root / "checkpoints", step)
    run.log.write_text("as it was")
    return run


def test_training_goes_on_from_the_newest_whole_checkpoint(run):
    assert resume_training(run, []) == "goes on from the checkpoint of step 20"
    cut(weights(run.root / "checkpoints" / "iter_0000020"))
    assert resume_training(run, []) == "goes on from the checkpoint of step 10"


def test_a_checkpoint_of_the_right_length_that_was_changed_is_removed(run):
    damage = ["checkpoints/iter_0000020/__0_0.distcp", "checkpoints/iter_0000020/.metadata"]
    assert resume_training(run, damage) == "goes on from the checkpoint of step 10"
    assert sorted(os.listdir(run.root / "checkpoints")) == ["iter_0000010", TRACKER]


@pytest.mark.parametrize("why", ["curve", "log", "checkpoints"])
def test_training_starts_over(run, why):
    damage = ["tensorboard/events.out"] if why == "curve" else []
    if why == "log":
        run.log.unlink()
    if why == "checkpoints":
        for step in (10, 20):
            cut(run.root / "checkpoints" / f"iter_00000{step}" / ".metadata")
    assert resume_training(run, damage) == ""


@pytest.fixture
def megatron(run, monkeypatch):
    """Plays Megatron, which prints these lines; returns its command and environment."""
    seen = []

    def python(command, take, environment):
        seen.append((command, environment, [take(line) for line in run.lines]))

    monkeypatch.setattr(run, "python", python)
    monkeypatch.setattr("torch.cuda.device_count", lambda: run.gpus)
    run.gpus, run.lines = 0, [VALID]
    run.save_stamp(Stamp("key"))
    return seen


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_layout(run, megatron, gpus, ranks):
    run.gpus = gpus
    train(run)
    [(command, environment, _)] = megatron
    assert command.startswith(f"{LAUNCH} {ranks} pretrain_satformer.py ")
    assert f"--pipeline-model-parallel-size {ranks} --architecture satformer" in command
    assert ("OMP_NUM_THREADS" in environment) == (gpus == 0)


def test_what_is_shown_of_the_log(run, megatron, capsys):
    run.lines = [*(LINE.format(n) for n in (1, 9, 10, 30)), VALID, SAVED, "whatever else"]
    assert train(run) == "step 30   validation loss 5.500"
    told = capsys.readouterr().out.splitlines()[1:]
    assert [line.strip() for line in told] == [
        "step 1/30   loss 5.000   2,048 tokens/s",
        "step 10/30   loss 5.000   2,048 tokens/s",
        "step 30/30   loss 5.000   2,048 tokens/s",
        "step 30   validation loss 5.500",
        "step 10   checkpoint saved",
    ]
    live = megatron[0][2]
    assert live[1] == "step 9/30   loss 5.000   2,048 tokens/s   about 00:21 left"
    assert live[-1] == ""


def test_an_end_without_validation_is_a_failure(run, megatron):
    run.lines = [LINE.format(1)]
    with pytest.raises(StepError, match="has no validation loss"):
        train(run)
