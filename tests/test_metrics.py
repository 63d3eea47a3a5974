"""metrics.jsonl and the log line of real runs: Megatron's values, once for each logged step."""

import os
import sys
from pathlib import Path

import pytest

from megatron_satformer.files.metrics_file import read_metrics
from tests.small import PP2, SHAPE

TOKENS = 8 * 64  # of a step


def records_of(folder, split="train"):
    return [r for r in read_metrics(Path(folder) / "metrics.jsonl") if r["split"] == split]


@pytest.mark.parametrize(("ranks", "layout"), [(1, ""), (2, PP2)])
def test_every_step_has_megatrons_values(pretrain, data_flags, ranks, layout):
    flags = [*SHAPE, *data_flags, *layout.split(), "--train-iters", 4, "--eval-interval", 2]
    run = pretrain(ranks, *flags)
    records = records_of(run.tensorboard)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["tokens"] for record in records] == [TOKENS * n for n in (1, 2, 3, 4)]
    for name, expected in {
        "lm_loss": run.losses,
        "grad_norm": run.grad_norms,
        "learning_rate": [*run.scalars("learning-rate").values()],
    }.items():
        assert [record[name] for record in records] == pytest.approx(expected, rel=1e-6)
    for record in records:
        seconds = record["seconds_per_step"]
        assert 0 < seconds < 60
        assert record["tokens_per_second"] == pytest.approx(TOKENS / seconds)
        assert record["mfu"] is None  # of a CPU
        assert 50 < record["peak_memory_mib"] < 20_000  # of the process
    evaluated = records_of(run.tensorboard, "validation")
    curve = run.scalars("lm loss validation")
    assert {record["step"] for record in evaluated} == {2, 4}
    assert evaluated[0]["lm_loss"] == pytest.approx(curve[2], rel=1e-6)
    assert len(records_of(run.tensorboard, "final validation")) == 1
    # On the board the test set has the name of validation, and overwrites step 4.
    (tested,) = records_of(run.tensorboard, "test")
    assert tested["lm_loss"] == pytest.approx(curve[4], rel=1e-6)


def test_lines_tell_memory_speed_and_time_left(pretrain, data_flags):
    run = pretrain(1, *SHAPE, *data_flags, "--train-iters", 3)
    lines = [line for line in run.output.splitlines() if " iteration  " in line]
    assert len(lines) == 3
    for line in lines:
        for told in ("tokens/s: ", "peak memory (MiB): ", "time left: "):
            assert told in line
    assert "time left: 0:00:00 |" in lines[-1]
    assert "allocated: 0.00" not in run.output


def test_an_interval_has_means(pretrain, data_flags):
    flags = [*SHAPE, *data_flags, "--train-iters", 4, "--log-interval", 2]
    run = pretrain(1, *flags)
    first, second, third = records_of(run.tensorboard)
    assert [first["step"], second["step"], third["step"]] == [1, 2, 4]  # Megatron tells the first
    told = [first["lm_loss"], second["lm_loss"], third["lm_loss"]]
    losses = run.losses
    means = [losses[0], losses[1], (losses[2] + losses[3]) / 2]
    assert told == pytest.approx(means, rel=1e-6)


def test_a_resumed_run_has_each_step_once(pretrain, data_flags, tmp_path):
    """Killed behind step 4, whose save was the last: it trains steps 5 and 6 again."""
    flags = [*SHAPE, *data_flags, "--train-iters", 6, "--save-interval", 4, "--eval-interval", 3]
    flags += ["--save", tmp_path, "--load", tmp_path]
    pretrain(1, *flags)
    before = read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    pretrain(1, *flags)
    after = read_metrics(tmp_path / "metrics.jsonl")
    names = ("step", "split", "lm_loss")
    told = [[tuple(record[name] for name in names) for record in run] for run in (before, after)]
    assert told[0] == told[1]
    assert len(set(told[1])) == len(told[1]) == 6 + 2 + 2


def test_utilization_of_a_known_gpu(zygote, data_flags):
    folder = zygote.folder / "utilization"
    argv = [*SHAPE, *data_flags, "--bf16", "--train-iters", 1, "--tensorboard-dir", folder]
    run = zygote.run(1, call="tests.test_metrics:train_on_a_teraflop", args=[[*map(str, argv)]])
    assert run.codes == [0], run.output[-3000:]
    (record,) = records_of(folder)
    assert record["mfu"] == pytest.approx(record["tflops_per_second_and_gpu"])
    assert f"MFU: {100 * record['mfu']:.1f}%" in run.output


def train_on_a_teraflop(argv):
    import pretrain_satformer
    from megatron_satformer import metrics

    metrics.device_peak = lambda cuda: 1e12
    sys.argv = ["pretrain_satformer.py", *argv]
    pretrain_satformer.main()


def test_memory_is_that_of_the_rank_that_holds_most(zygote, data_flags, tmp_path):
    argv = [*SHAPE, *data_flags, *PP2.split(), "--train-iters", 2, "--tensorboard-dir", tmp_path]
    run = zygote.run(2, call=f"{__name__}:train_with_weight", args=[[*map(str, argv)]])
    assert run.codes == [0, 0], run.output[-3000:]
    most, writer = (float((tmp_path / f"{rank}").read_text()) for rank in (0, 1))
    assert most > writer + 300
    assert records_of(tmp_path)[-1]["peak_memory_mib"] == pytest.approx(most, rel=0.02)


def train_with_weight(argv):
    import torch

    import pretrain_satformer

    rank = int(os.environ["RANK"])
    weight = torch.ones(100 * 2**20) if rank == 0 else None  # 400 MiB
    sys.argv = ["pretrain_satformer.py", *argv]
    pretrain_satformer.main()
    folder = Path(argv[argv.index("--tensorboard-dir") + 1])
    (folder / f"{rank}").write_text(f"{torch.cuda.max_memory_allocated() / 2**20}")
    del weight


def test_a_file_that_cannot_be_written_does_not_end_the_run(pretrain, data_flags, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    flags = [*SHAPE, *data_flags, "--train-iters", 2, "--save-interval", 9, "--save", tmp_path]
    run = pretrain(1, *flags)
    assert run.output.count("WARNING: metrics.jsonl is not written any more: ") == 1
    assert len(run.losses) == 2


def test_arguments_go_to_a_file_or_else_to_the_console(pretrain, data_flags, tmp_path):
    flags = [*SHAPE, *data_flags, "--train-iters", 1]
    run = pretrain(1, *flags, "--save", tmp_path, "--save-interval", 1)
    assert f"all arguments: {tmp_path / 'arguments.txt'}" in run.output
    assert "  hidden_size ............" in (tmp_path / "arguments.txt").read_text()
    assert "  hidden_size ............" not in run.output
    nowhere = pretrain(1, *flags, board=False).output
    assert "  hidden_size ............" in nowhere
    told = "WARNING: metrics.jsonl is not written without --save or --tensorboard-dir."
    assert nowhere.count(told) == 1
