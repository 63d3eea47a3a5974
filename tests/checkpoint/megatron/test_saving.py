"""Whatever ends a run, a whole checkpoint is there, and a restart goes on from it."""

import os
import re

import pytest
from torch.distributed.checkpoint import FileSystemReader

from megatron_satformer.checkpoint.megatron.reader import TRACKER, list_steps
from megatron_satformer.checkpoint.megatron.recovery import find_recovery, find_step_damage
from megatron_satformer.files.metrics_file import read_metrics
from tests.small import DO, PP2, SHAPE

ASYNC = "--async-save --async-strategy mcore --use-persistent-ckpt-worker"
KILLS = 20
SLOW = pytest.mark.slow


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def losses(folder):
    """Of every step, in order; a step that is there twice shows."""
    records = [r for r in read_metrics(folder / "metrics.jsonl") if r["split"] == "train"]
    return [(record["step"], record["lm_loss"]) for record in records]


@pytest.fixture
def train(zygote, data_flags, tmp_path):
    """Trains on so many ranks, saving to and loading from one folder, while something happens."""

    def run(ranks, flags, step=0, event="", code=0, folder="run"):
        places = ["--save", tmp_path / folder, "--load", tmp_path / folder]
        argv = [*map(str, [*SHAPE, *data_flags, *places, *flags.split()])]
        result = zygote.run(ranks, call="tests.faults:train", args=[argv, step, event])
        assert result.codes == [code] * ranks, result.output[-6000:]
        return result

    return run


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def test_old_steps_go_and_a_changed_one_is_passed_over(train, folder):
    flags = "--train-iters 8 --save-interval 1 --keep-last 2 --save-retain-interval 3"
    train(1, flags)
    straight = losses(folder)
    assert list_steps(folder) == [3, 6, 7, 8]
    assert [find_step_damage(folder / f"iter_000000{n}") for n in (3, 6, 7, 8)] == [""] * 4
    [weights] = (folder / "iter_0000008").glob("*.distcp")
    flip_a_bit(weights)
    named = f"{weights} is not as it was written (the checksum of "
    chosen = train(1, f"{flags} --ckpt-step 8", code=2).output
    assert f"error: ckpt_step (8) must be a whole step of load ({folder}): {named}" in chosen
    healed = train(1, flags).output
    assert f"WARNING: {named}" in healed
    assert f"{TRACKER} in {folder} now names step 7, the newest whole one" in healed
    assert losses(folder) == straight
    assert find_step_damage(folder / "iter_0000008") == ""
    flip_a_bit(folder / "iter_0000008" / ".metadata")
    assert find_recovery(folder).step == 7


@SLOW
def test_what_ends_a_run_saves_it(train, folder, tmp_path):
    """Signals to one of two ranks, a file, a time limit; together the run that nothing ended."""
    flags = f"--train-iters 12 --save-interval 100 {PP2}"
    train(2, flags, folder="straight")
    stop = tmp_path / "stop"
    for step, extra, event, told in (
        (2, "--exit-signal-handler", "SIGTERM", "a signal to rank 1"),
        (4, "--exit-signal-handler", "SIGUSR2", "a signal to rank 1"),
        (6, f"--exit-trigger-file {stop}", f"touch {stop}", f"exit_trigger_file ({stop})"),
        (8, "--exit-duration-in-mins 30", "minutes", "exiting program after "),
    ):
        run = train(2, f"{flags} {extra}", step, event)
        assert told in run.output
        assert (folder / TRACKER).read_text() == str(step)
    assert not stop.exists()
    train(2, flags)
    assert losses(folder) == losses(tmp_path / "straight")


@SLOW
@pytest.mark.parametrize("extra", ["", ASYNC])
def test_a_full_disk_leaves_the_step_before(train, folder, tmp_path, extra):
    flags = f"--train-iters 6 --save-interval 1 --keep-last 1 {PP2} {DO}"
    train(2, flags, folder="straight")
    run = train(2, f"{flags} {extra}", 4, "full 400000", code=2)
    [told] = re.findall(r"^error: .*", run.output, re.MULTILINE)
    place = folder / "iter_0000004" / "__1_0.distcp"
    assert f"save ({folder}) must take the checkpoint of step 4, and cannot: " in told
    assert f"{place}: File too large (rank 1). That of step 3 is as it was." in told
    assert list_steps(folder) == [3]
    assert find_recovery(folder) is None
    pieces = FileSystemReader(folder / "iter_0000003").read_metadata().storage_data.values()
    assert all(hasattr(place, "crc32") for place in pieces)
    train(2, flags)
    assert losses(folder) == losses(tmp_path / "straight")


@SLOW
def test_killed_at_random_while_it_saves(train, folder, tmp_path):
    """Every start loads what the kill before it has left, and old steps go all the while."""
    steps = 400
    flags = f"--train-iters {steps} --save-interval 1 --keep-last 2"
    seed = int(os.environ.get("KILL_SEED", 0))
    print(f"KILL_SEED={seed}")
    reached = 1
    for kill in range(KILLS):
        run = train(1, flags, reached + 1, f"kill {seed}-{kill}", code=-9)
        found = find_recovery(folder)
        named = int((folder / TRACKER).read_text()) if found is None else found.step
        assert f"loaded checkpoint from {folder}" in re.sub(r"\s+", " ", run.output) or kill == 0
        assert named >= reached, "what was saved is lost"
        reached = named
    train(1, f"{flags} --exit-interval {reached + 2}")
    straight = f"--train-iters {steps} --save-interval 1000 --exit-interval {reached + 2}"
    train(1, straight, folder="straight")
    assert losses(folder) == losses(tmp_path / "straight")
