import io
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from megatron_satformer.quickstart import checkpoints, steps, training
from megatron_satformer.quickstart.console import Console
from megatron_satformer.quickstart.folder import RunFolder
from megatron_satformer.quickstart.recipe import Recipe, as_flags
from megatron_satformer.quickstart.runner import Job

LINE = " iteration {:8d}/     30 | elapsed time per iteration (ms): 1000.0 | lm loss: 5.0E+00 |\n"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def write_checkpoint(folder, step):
    target = folder / f"iter_{step:07d}"
    tensors = {f"layer{n}": torch.randn(40, 50) for n in range(3)}
    save(tensors, storage_writer=FileSystemWriter(target), no_dist=True)
    (target / "metadata.json").write_text("{}")
    (folder / checkpoints.TRACKER).write_text(str(step))
    return target


@pytest.fixture
def job(tmp_path):
    """A training step, begun before, stopped after the checkpoint of step 20."""
    folder = RunFolder(tmp_path / "run")
    for step in (10, 20):
        write_checkpoint(folder.root / "checkpoints", step)
    (folder.root / "tensorboard").mkdir()
    (folder.root / "train.log").write_text("".join(LINE.format(n) for n in range(1, 26)))
    step = next(step for step in steps.build_steps(Recipe()) if step.name == "train")
    return Job(step, folder, Console(io.StringIO()), "key", {}, {}, resumable=True)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_training_goes_on(job):
    assert training.prepare_training(job) == "goes on from the checkpoint of step 20"
    assert checkpoints.last_step(job.root / "checkpoints") == 20


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: cut(next(folder.glob("*.distcp"))),
        lambda folder: cut(folder / ".metadata"),
        lambda folder: next(folder.glob("*.distcp")).unlink(),
        lambda folder: (folder / "metadata.json").unlink(),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_passed_over(job, damage):
    damage(job.root / "checkpoints" / "iter_0000020")
    assert training.prepare_training(job) == "goes on from the checkpoint of step 10"
    assert checkpoints.last_step(job.root / "checkpoints") == 10
    assert not (job.root / "checkpoints" / "iter_0000020").exists()


def test_a_checkpoint_that_was_changed_is_passed_over(job):
    job.damage = {"checkpoints/iter_0000020/__0_0.distcp": "was changed"}
    assert training.prepare_training(job) == "goes on from the checkpoint of step 10"


@pytest.mark.parametrize("content", ["", "40", "x"])
def test_a_wrong_tracker_is_put_right(job, content):
    (job.root / "checkpoints" / checkpoints.TRACKER).write_text(content)
    assert training.prepare_training(job) == "goes on from the checkpoint of step 20"
    assert checkpoints.last_step(job.root / "checkpoints") == 20


@pytest.mark.parametrize("why", ["options", "history", "log", "none"])
def test_training_starts_over(job, why):
    if why == "options":
        job.resumable = False
    elif why == "history":
        job.damage = {"tensorboard/events.out": "is missing"}
    elif why == "log":
        (job.root / "train.log").write_text(LINE.format(1))
    else:
        for step in (10, 20):
            cut(job.root / "checkpoints" / f"iter_{step:07d}" / ".metadata")
    assert training.prepare_training(job) == ""
    assert not any((job.root / name).exists() for name in training.OUTPUTS)


def test_flags_of_training():
    recipe = Recipe()
    command = training.training_command(Path("/run"), recipe, ranks=2)
    flags = dict(itertools.pairwise(command))
    assert flags["--pipeline-model-parallel-size"] == flags["--nproc-per-node"] == "2"
    assert flags["--load"] == flags["--save"] == "/run/checkpoints"
    assert flags["--train-iters"] == str(recipe.train_iters)
    assert "--save" not in training.training_command(Path("/run"), recipe, ranks=2, save=False)
    assert as_flags({"a_b": 1}) == ["--a-b", "1"]


def test_a_short_run_is_validated_and_saved_too():
    options = replace(Recipe(), train_iters=8).training_options()
    assert options["eval_interval"] == options["save_interval"] == 4
    assert options["lr_warmup_iters"] < 8


def test_console_lines_of_training(job):
    stream = job.console.stream
    progress = training._Progress(job, replace(Recipe(), train_iters=30))
    live = [
        progress.take(line)
        for line in (
            *(LINE.format(n) for n in (1, 9, 10)),
            " validation loss at iteration 10 | lm loss value: 5.5E+00 | lm loss PPL: 2E+02 | ",
            "  [2026-11-22] successfully saved checkpoint from iteration      10 to /x [ t 1/1 ]",
            "whatever else",
        )
    ]
    told = [line.strip() for line in stream.getvalue().splitlines()]
    assert [line.split("   ")[:2] for line in told] == [
        ["step  1/30", "loss 5.000"],
        ["step 10/30", "loss 5.000"],
        ["step 10/30", "validation loss 5.500"],
        ["step 10/30", "checkpoint saved"],
    ]
    assert live[1] == "step 9/30   loss 5.000   2,048 tokens/s   about 21.0 s left"
    assert live[3:] == ["", "", ""]
