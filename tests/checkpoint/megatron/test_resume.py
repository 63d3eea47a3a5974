"""A stopped run continues as if it had never stopped; what is asked otherwise is told."""

import math
from itertools import pairwise

import pytest

from tests.parallel.layouts import CARRYING, FROM_IDS, READING
from tests.small import DO, PP2, SHAPE, SP, TP2

DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
# The gradients overflow at first: the scale comes down, and goes up after every 4 good steps.
FP16 = f"--fp16 --initial-loss-scale {2**22} --loss-scale-window 4 --hysteresis 1"
ASYNC = "--async-save --async-strategy mcore --use-persistent-ckpt-worker"
VIRTUAL = f"{PP2} --num-layers-per-virtual-pipeline-stage 1"
CURVES = ("lm loss", "grad-norm", "learning-rate", "loss-scale")
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("ranks", "extra"),
    [
        (1, ""),
        pytest.param(2, f"{PP2} --bf16", marks=SLOW),
        pytest.param(2, f"{DO} {DROPOUT}", marks=SLOW),
        pytest.param(2, f"{DO} {FP16}", marks=SLOW),
        pytest.param(2, VIRTUAL, marks=SLOW),
        pytest.param(2, f"{PP2} {FROM_IDS}", marks=SLOW),
        pytest.param(2, f"{PP2} {DO} {ASYNC}", marks=SLOW),
        *(
            pytest.param(2, f"{DO} --architecture {name}", marks=SLOW)
            for name in (*CARRYING, *READING)
        ),
        pytest.param(2, f"{DO} --ckpt-fully-parallel-load", marks=SLOW),
        pytest.param(2, f"{PP2} --architecture resformer --ckpt-format torch", marks=SLOW),
        pytest.param(4, f"{TP2} {PP2} {SP} {DO} {DROPOUT}", marks=SLOW),
        pytest.param(4, f"{PP2} {DO} --overlap-grad-reduce --overlap-param-gather", marks=SLOW),
    ],
    ids=str,
)
def test_resume_continues_to_the_last_digit(pretrain, data_flags, tmp_path, ranks, extra):
    flags = [*SHAPE, *data_flags, *extra.split(), "--train-iters", 20]
    straight = pretrain(ranks, *flags)
    saving = [*flags, "--save", tmp_path, "--save-interval", 10]
    first = pretrain(ranks, *saving, "--exit-interval", 10)
    second = pretrain(ranks, *saving, "--load", tmp_path)
    for curve in CURVES:
        assert first.scalars(curve) | second.scalars(curve) == straight.scalars(curve), curve
    assert list(first.scalars("lm loss")) == list(range(1, 11))
    if FP16 in extra:
        scales = list(straight.scalars("loss-scale").values())
        steps = {after / before for before, after in pairwise(scales)}
        assert steps == {0.5, 1.0, 2.0}


@pytest.mark.slow
def test_stop_between_two_evaluations(pretrain, data_flags, tmp_path):
    flags = [*SHAPE, *data_flags, "--train-iters", 16, "--eval-interval", 4]
    straight = pretrain(1, *flags)
    saving = [*flags, "--save", tmp_path, "--save-interval", 10]
    first = pretrain(1, *saving, "--exit-interval", 10)
    second = pretrain(1, *saving, "--load", tmp_path)
    curve = "lm loss validation"
    assert list(straight.scalars(curve))[:4] == [4, 8, 12, 16]
    assert first.scalars(curve) | second.scalars(curve) == straight.scalars(curve)
    assert first.losses + second.losses == straight.losses


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--architecture resformer", "architecture (resformer) must be that of the checkpoint"),
        ("--value-gate tanh", "value_gate (tanh) must be that of the checkpoint in load"),
        ("--value-residual-last-k 2", "value_residual_last_k (2) must be that of the checkpoint"),
        ("--value-gate tanh --finetune", "value_gate (tanh) must be that of the checkpoint"),
        ("--norm-epsilon 1e-5", "layernorm_epsilon (1e-05) must be that of the checkpoint in load"),
        ("--no-qk-layernorm --finetune", "qk_layernorm (False) must be that of the checkpoint"),
    ],
)
def test_a_checkpoint_is_not_continued_as_another_model(started, pretrain, flags, told):
    common, _ = started("satformer")
    resumed = [flag for flag in common if flag != "--finetune"]
    run = pretrain(1, *resumed, *flags.split(), code=2)
    assert told in run.output
    assert "which is (" in run.output


@pytest.mark.slow
def test_an_optimizer_is_not_continued_with_other_groups(started, pretrain):
    """Megatron would look for the group of another learning rate in it, on every rank."""
    common, _ = started("lime")
    resumed = [flag for flag in common if flag not in ("--finetune", "--no-load-optim")]
    run = pretrain(1, *resumed, "--lime-router-lr-mult", 5, code=2)
    assert "lime_router_lr_mult (5.0) must be that of the checkpoint in load (" in run.output
    assert "which is (10.0): it says how the optimizer" in run.output
    pretrain(1, *common, "--lime-router-lr-mult", 5)  # with fresh moments


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("", "async_save (True) must come with --use-persistent-ckpt-worker"),
        ("--async-strategy mcore", "async_save (True) must come with --use-persistent-ckpt-worker"),
    ],
)
def test_async_save_is_not_dropped_silently(pretrain, data_flags, flags, told):
    flags = [*SHAPE, *data_flags, "--train-iters", 1, "--async-save", *flags.split()]
    assert told in pretrain(1, *flags, code=2).output


def test_async_save_without_its_package(pretrain, data_flags):
    from megatron.core.dist_checkpointing.strategies.torch import get_async_strategy

    try:
        get_async_strategy("nvrx")
    except ModuleNotFoundError:
        flags = "--train-iters 1 --async-save --use-persistent-ckpt-worker".split()
        run = pretrain(1, *SHAPE, *data_flags, *flags, code=2)
        assert "async_strategy (nvrx) needs a version of nvidia-resiliency-ext" in run.output
        assert "or use --async-strategy mcore" in run.output
    else:
        pytest.skip("nvidia-resiliency-ext is installed")


@pytest.fixture(scope="module")
def stopped(pretrain, data_flags, tmp_path_factory):
    """Flags of a run of 20 steps, 160 samples, and the folder where its first 10 are saved."""
    made = {}

    def stop(length="--train-iters 20", extra=""):
        if (length, extra) not in made:
            folder = tmp_path_factory.mktemp("stopped")
            flags = [*SHAPE, *data_flags, *extra.split()]
            saving = ["--save", folder, "--save-interval", 10, "--exit-interval", 10]
            pretrain(1, *flags, *length.split(), *saving, board=False)
            made[length, extra] = flags, folder
        return made[length, extra]

    return stop


def cosine(samples, end=160, lr=3e-3, low=3e-4):
    return low + (lr - low) * (1 + math.cos(math.pi * samples / end)) / 2


ITERS, SAMPLES = "--train-iters 20", "--train-samples 160"
ANEW, KEPT = "--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"


# What the run that goes on is given; samples of its last step; its learning rates by samples.
GOES_ON = [
    (ITERS, "--global-batch-size 16", 160, cosine),
    pytest.param(SAMPLES, "--global-batch-size 16", 160, cosine, marks=SLOW),
    pytest.param(ITERS, "--global-batch-size 4", 160, cosine, marks=SLOW),
    pytest.param(SAMPLES, "--global-batch-size 4", 160, cosine, marks=SLOW),
    pytest.param(ITERS, f"--train-iters 30 {ANEW}", 240, lambda n: cosine(n, 240), marks=SLOW),
    pytest.param(ITERS, f"--train-iters 30 {KEPT}", 240, lambda n: cosine(min(n, 160)), marks=SLOW),
    (ITERS, f"--lr 1e-3 --min-lr 1e-4 {ANEW}", 160, lambda n: cosine(n, lr=1e-3, low=1e-4)),
    pytest.param(ITERS, f"--lr 1e-3 {KEPT}", 160, cosine, marks=SLOW),
    pytest.param(ITERS, "--no-load-optim", 160, cosine, marks=SLOW),
]


@pytest.mark.parametrize(("length", "given", "end", "rate"), GOES_ON)
def test_the_end_and_the_learning_rates_are_those_asked_for(
    stopped, pretrain, length, given, end, rate
):
    flags, folder = stopped(length)
    run = pretrain(1, *flags, *length.split(), "--load", folder, *given.split())
    batch = int(given.split()[1]) if "batch" in given else 8
    samples = {11 + n: 80 + (n + 1) * batch for n in range((end - 80) // batch)}
    rates = run.scalars("learning-rate")
    assert list(rates) == list(samples)
    assert rates == pytest.approx({step: rate(n) for step, n in samples.items()}, rel=1e-5)
    assert "what it means" in run.output


@pytest.mark.slow
def test_other_ranks_follow_what_rank_0_has_found(stopped, pretrain):
    flags, folder = stopped(ITERS, f"{DO} --architecture lime")
    given = f"{ITERS} --global-batch-size 16 --lr 1e-3 {ANEW} --train-iters 15"
    run = pretrain(2, *flags, *given.split(), "--load", folder)
    rates = run.scalars("learning-rate")
    assert rates[15] == pytest.approx(3e-4)
    assert rates[11] == pytest.approx(cosine(96, lr=1e-3), rel=1e-5)
    assert run.output.count("what it means") == 1


NOT_SAVED = f"{ITERS} --no-save-optim --no-save-rng"
REFUSED = [
    (ITERS, "--train-iters 30", "train_iters (30 steps, 240 samples) must be that of the"),
    (ITERS, "--lr 1e-3", "lr (0.001) must be that of the checkpoint, which is (0.003), or the run"),
    (ITERS, "--lr-warmup-iters 4", "lr_warmup_iters (32 samples) must be that of the checkpoint"),
    (ITERS, "--seq-length 32", "seq_length (32) must be that of the checkpoint, which is (64): "),
    (ITERS, "--seed 1", "Undo that, or add --allow-data-change seed."),
    (ITERS, "--bf16", "bf16 (True) must be that of the checkpoint in load ("),
    (ITERS, "--optimizer sgd", "optimizer (sgd) must be that of the checkpoint in load ("),
    (ITERS, "--allow-data-change sed", "invalid choice: 'sed'"),
    (NOT_SAVED, ITERS, "was saved without the optimizer's state (--no-save-optim). Add --no-load-"),
    (SAMPLES, "--train-samples 320", "train_samples (320 samples) must be that of the checkpoint"),
]


@pytest.mark.parametrize(("length", "given", "told"), REFUSED, ids=str)
def test_what_must_not_change_unasked_is_one_line(stopped, pretrain, length, given, told):
    flags, folder = stopped(length)
    length = [] if given == ITERS else length.split()
    run = pretrain(1, *flags, *length, "--load", folder, *given.split(), code=2)
    [line] = [line for line in run.output.splitlines() if "error: " in line]
    assert told in line
    assert "Traceback" not in run.output
    assert ("what it means" in run.output) == ("invalid choice" not in told)


@pytest.mark.slow
def test_a_checkpoint_of_weights_alone_goes_on_where_the_schedule_stopped(stopped, pretrain):
    flags, folder = stopped(NOT_SAVED)
    run = pretrain(1, *flags, *ITERS.split(), "--load", folder, "--no-load-optim")
    assert run.scalars("learning-rate")[11] == pytest.approx(cosine(88), rel=1e-5)
    for told in ("fresh moments; the learning rate goes on at sample 80", "dropout draws as from"):
        assert told in run.output


def test_a_folder_without_a_checkpoint_is_not_trained_over(pretrain, data_flags, tmp_path):
    flags = [*SHAPE, *data_flags, "--train-iters", 1, "--load", tmp_path / "typo"]
    run = pretrain(1, *flags, code=2)
    assert f"error: load ({tmp_path / 'typo'}) must be a folder of checkpoints" in run.output
    assert len(pretrain(1, *flags, "--allow-fresh-start").losses) == 1


@pytest.mark.slow
def test_a_run_that_is_done_says_so(pretrain, data_flags, tmp_path):
    flags = [*SHAPE, *data_flags, "--train-iters", 2, "--save", tmp_path, "--save-interval", 2]
    pretrain(1, *flags, "--load", tmp_path)  # the first start of a restartable command line
    done = pretrain(1, *flags, "--load", tmp_path, board=False)
    assert "nothing is left to train, 2 steps with 16 samples are done" in done.output
