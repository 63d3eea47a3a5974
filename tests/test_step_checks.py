"""Steps whose loss or gradients are no numbers, in real runs: told, skipped, made again."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_satformer.files.metrics_file import read_metrics
from tests.datasets import write_dataset
from tests.small import DO, PP2, RTOL, SHAPE, SP, TP2

FAILED = 17  # Megatron's exit code


@pytest.fixture
def spoiled(zygote):
    """Runs tests.bad_steps on so many ranks."""

    def run(ranks, flags, steps, kind="loss", rank=0, code=0):
        argv = [*map(str, flags)]
        found = zygote.run(ranks, call="tests.bad_steps:train", args=[argv, steps, rank, kind])
        assert found.codes == [code] * ranks, found.output[-6000:]
        return found

    return run


def saving(folder, every):
    return ["--save", folder, "--load", folder, "--save-interval", every]


def train_records(folder):
    return [r for r in read_metrics(Path(folder) / "metrics.jsonl") if r["split"] == "train"]


def tensors_of(folder, step):
    """Weights and moments of a checkpoint."""
    reader = FileSystemReader(Path(folder) / f"iter_{step:07d}")
    known = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.zeros(value.size, dtype=value.properties.dtype)
        for key, value in known.items()
        if isinstance(value, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert any("exp_avg" in key for key in one)
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


def test_bad_steps_are_skipped_and_one_too_many_ends_the_run(spoiled, data_flags, tmp_path):
    flags = [*SHAPE, *data_flags, *saving(tmp_path, 3), "--train-iters", 8]
    run = spoiled(1, [*flags, "--skip-nan-steps", 1], [1, 4, 5], code=FAILED)
    for step in (1, 4):
        told = rf"WARNING: step {step} is skipped \(1 of at most 1 in a row\): the loss is nan in "
        where = r"sample 3 of the batch \(\S+/corpus_text_document, documents? \d.*, rank 0\)\."
        assert len(re.findall(told + where, run.output)) == 1
    (error,) = re.findall(r"^error: .*$", run.output, re.MULTILINE)
    assert "step 5 cannot count: the loss is nan in sample 3 of the batch" in error
    assert f"The weights of step 4 are saved in {tmp_path}." in error
    assert "a --skip-nan-steps above 1." in error
    records = train_records(tmp_path)
    assert [record["skipped_steps"] for record in records] == [1, 0, 0, 1]
    assert ["lm_loss" in record for record in records] == [False, True, True, False]
    assert "lm loss: 0.000000E+00" not in run.output
    assert_same(tensors_of(tmp_path, 3), tensors_of(tmp_path, 4))


@pytest.mark.slow
def test_a_run_that_ended_goes_on(spoiled, pretrain, data_flags, tmp_path):
    """With the step as it should have been: the losses of a run that never ended."""
    flags = [*SHAPE, *data_flags, *saving(tmp_path, 100), "--train-iters", 6, "--skip-nan-steps", 1]
    spoiled(1, flags, [3, 4], code=FAILED)
    again = spoiled(1, flags, [4], code=FAILED)
    assert "It would be one more than skip_nan_steps (1) in a row." in again.output
    assert "is skipped" not in again.output, "the count does not begin anew"
    assert "The weights of step 3 are as they were loaded." in again.output
    went_on = pretrain(1, *flags)
    other = [*SHAPE, *data_flags, "--train-iters", 6, "--skip-nan-steps", 1]
    whole = spoiled(1, [*other, "--tensorboard-dir", tmp_path / "whole"], [3])
    assert "step 3 is skipped" in whole.output
    losses = {record["step"]: record.get("lm_loss") for record in train_records(tmp_path / "whole")}
    assert went_on.losses == pytest.approx([losses[step] for step in (4, 5, 6)], rel=1e-6)


# Ranks and flags; a router's biases move with every backward pass, before the optimizer's step.
EXPERTS = """--num-experts 4 --expert-model-parallel-size 2 --moe-router-score-function sigmoid
--moe-router-enable-expert-bias"""
LAYOUTS = {
    "loss": (8, f"{TP2} {SP} {PP2} {DO} --bf16 --overlap-grad-reduce"),
    "gradients": (
        4,
        f"{PP2} {DO} --num-virtual-stages-per-pipeline-rank 2 --bf16 --overlap-grad-reduce "
        f"--overlap-param-gather {EXPERTS}",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_rank_skips(spoiled, data_flags, tmp_path, kind):
    """The second replica's first stage meets it: the sample is the last stage's to name."""
    ranks, flags = LAYOUTS[kind]
    flags = [*SHAPE, *data_flags, *flags.split(), *saving(tmp_path, 1), "--train-iters", 3]
    flags += ["--dist-ckpt-optim-fully-reshardable"]  # by parameter, not by buckets with gaps
    bad = ranks // 4
    run = spoiled(ranks, [*flags, "--skip-nan-steps", 2], [2], kind, rank=bad)
    (told,) = re.findall(r"^WARNING: step 2 is skipped \(1 of at most 2.*$", run.output, re.M)
    if kind == "loss":
        # Two replicas take two samples each at a time; this is its second row of its second two.
        assert "the loss is nan in sample 7 of the batch (" in told
        assert "corpus_text_document, document" in told
    else:
        assert "local grad norm for bucket #0 in backward pass before data-parallel" in told
        assert f"(rank {bad})" in told
        assert any("expert_bias" in key for key in tensors_of(tmp_path, 1))
    assert_same(tensors_of(tmp_path, 1), tensors_of(tmp_path, 2))
    moved = tensors_of(tmp_path, 3)
    assert any(not torch.equal(old, moved[key]) for key, old in tensors_of(tmp_path, 2).items())


@pytest.mark.slow
def test_what_is_well_when_made_again_counts(spoiled, pretrain, data_flags, tmp_path):
    flags = [*SHAPE, *data_flags, "--train-iters", 3, "--hidden-dropout", 0.1]
    run = spoiled(1, [*flags, "--tensorboard-dir", tmp_path], [1, 2], "once")
    assert run.output.count("was made again, all was well, and it counts; before, the loss is") == 2
    losses = [record["lm_loss"] for record in train_records(tmp_path)]
    assert losses == pytest.approx(pretrain(1, *flags).losses, rel=RTOL)


@pytest.mark.slow
def test_a_spike_is_told_and_counts(spoiled, data_flags, tmp_path):
    flags = [*SHAPE, *data_flags, "--train-iters", 30, "--check-for-spiky-loss"]
    flags += ["--global-batch-size", 16, "--tensorboard-dir", tmp_path]
    run = spoiled(2, [*flags, *PP2.split()], [20], "spike", rank=1)
    (told,) = re.findall(r"^WARNING: .*jumps.*$", run.output, re.MULTILINE)
    assert told.startswith("WARNING: step 20 the loss per token jumps to ")
    assert "in sample 3 of the batch (" in told
    assert "rank 1)" in told
    assert sum(record["skipped_steps"] for record in train_records(tmp_path)) == 0


@pytest.fixture
def damaged(zygote, tmp_path):
    """Runs training on data that are damaged in step 2; returns the run and the data's file."""

    def run(how, code, *flags):
        random = np.random.default_rng(0)
        lengths = random.integers(100, 200, 80)
        tokens = random.integers(0, 90, lengths.sum())
        prefix = write_dataset(tmp_path / "text", tokens, lengths)
        argv = [*SHAPE, "--tokenizer-type", "NullTokenizer", "--vocab-size", 100, *flags]
        argv += ["--data-path", prefix, "--split", "8,2,0", "--train-iters", 4]
        argv = [*map(str, argv)]
        run = zygote.run(1, call="tests.bad_steps:train_on_damaged", args=[argv, 2, prefix, how])
        assert run.codes == [code], run.output[-6000:]
        return run.output, rf"{prefix}\.bin"

    return run


def test_a_damaged_sample_names_file_and_document(damaged, tmp_path):
    output, file = damaged("foreign", FAILED, "--eval-iters", 0, *saving(tmp_path / "run", 100))
    (error,) = re.findall(r"^error: .*$", output, re.MULTILINE)
    told = rf"{file} has the token 65000 in document \d+, and the tokenizer's vocabulary is 100: "
    assert re.search(rf"step 2 cannot count: {told}", error), error
    assert "The weights of step 1 are saved in" in error


@pytest.mark.slow
def test_steps_and_evaluations_go_on_without_damaged_samples(damaged, tmp_path):
    output, file = damaged("cut", 0, "--skip-nan-steps", 9, "--tensorboard-dir", tmp_path)
    told = rf"{file} has [\d,]+ bytes, and document \d+ ends at [\d,]+: it has been cut off since"
    skipped = sum(record["skipped_steps"] for record in train_records(tmp_path))
    assert skipped == len(re.findall(rf"^WARNING: step \d is skipped .*{told}", output, re.M)) > 0
    assert re.search(rf"^WARNING: an evaluation leaves a sample out: {told}", output, re.M)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--skip-nan-steps -1", "skip_nan_steps (-1) must be at least 0."),
        (
            "--skip-nan-steps 2 --rerun-mode disabled",
            "rerun_mode (disabled) must be (validate_results) with skip_nan_steps (2):",
        ),
    ],
)
def test_what_does_not_go_with_skipping(pretrain, data_flags, flags, told):
    run = pretrain(1, *SHAPE, *data_flags, "--train-iters", 1, *flags.split(), code=2)
    assert f"error: {told}" in run.output
