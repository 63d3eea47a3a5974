"""--dry-run: what the run would refuse, and nothing but words."""

import os
import re
from pathlib import Path

import pytest

from tests.small import PP2, SHAPE, TP2

DEBUG = """--model-size debug --mock-data --tokenizer-type NullTokenizer --vocab-size 1023
--dry-run""".split()


def test_plans_for_1024_ranks_from_one_process_and_writes_nothing(pretrain, data_flags, tmp_path):
    """Data, checkpoints, TensorBoard and an index that is not built yet are all named."""
    flags = [*SHAPE, *data_flags, "--train-iters", 3, "--dry-run", "--gpus", 1024]
    flags += [*PP2.split(), *TP2.split(), "--sequence-parallel", "--global-batch-size", 1024]
    names = "save load tensorboard-dir data-cache-path"
    for name in names.split():
        flags += [f"--{name}", tmp_path / ("run" if name in ("save", "load") else name)]
    flags += ["--save-interval", 1]
    before = set(Path(data_flags[1]).parent.iterdir())
    shown = pretrain(1, *flags, board=False).output
    assert "on 1024 ranks" in shown
    assert re.search(r"fits: stage 0 needs 0\.0\d of 80 GB on H100", shown)
    assert "boundary behind chunk 0: 0.03 MiB" in shown  # [64 / 2, 2, 64 + 64] in fp32
    assert "step: " in shown
    assert not [*tmp_path.iterdir()]
    assert set(Path(data_flags[1]).parent.iterdir()) == before


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (3, TP2),
        (2, "--micro-batch-size 3"),
        pytest.param(2, "--num-attention-heads 3", marks=pytest.mark.slow),
        pytest.param(1, "--load nowhere", marks=pytest.mark.slow),
        pytest.param(1, f"--save {os.devnull} --log-progress", marks=pytest.mark.slow),
    ],
)
def test_refuses_what_the_run_refuses_in_the_same_words(zygote, ranks, flags):
    argv = [*SHAPE, *DEBUG[2:-1], "--train-iters", "1", *flags.split(), "--device", "cpu"]
    run = zygote.run(ranks, argv=argv)
    plan = zygote.run(1, argv=[*argv, "--dry-run", "--gpus", str(ranks)])
    assert run.codes == [2] * ranks
    assert plan.codes == [2]
    assert _error(plan) == _error(run)


def _error(run):
    (line,) = re.findall(r"^error: .*", run.output, re.MULTILINE)
    return line


@pytest.mark.slow
def test_search_lists_what_fits_and_why_others_do_not(pretrain):
    flags = "--gpus 2 --search --gpu-memory 0.07 --recompute-granularity selective".split()
    shown = pretrain(1, *DEBUG, *flags, board=False).output
    told = shown.partition("SEARCH: ")[2]
    fitting, _, others = told.partition("why others do not:")
    times = [float(time) for time in re.findall(r"([\d.]+) s a step", fitting)]
    assert times
    assert times == sorted(times)
    assert "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1: needs" in others
    assert "of 0.07 GB with --micro-batch-size 1" in others


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--gpus 0", "gpus (0) must be above 0"),
        ("--gpu h1000", "gpu (h1000) must be one of h100"),
        ("--utilization 40", "utilization (40.0) must be at most 1"),
    ],
)
@pytest.mark.slow
def test_options_of_a_plan_that_say_nothing_are_refused(pretrain, flags, told):
    assert told in pretrain(1, *DEBUG, *flags.split(), code=2).output


@pytest.mark.slow
def test_options_of_a_plan_need_one(pretrain):
    shown = pretrain(1, *DEBUG[:-1], "--gpus", 8, code=2).output
    assert "gpus (8) must come with dry_run (False)" in shown
