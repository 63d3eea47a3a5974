"""A stopped run continues as if it had never stopped; another model is not continued."""

from itertools import pairwise

import pytest

from tests.parallel.layouts import CARRYING
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
        (2, f"{DO} {FP16}"),
        pytest.param(2, VIRTUAL, marks=SLOW),
        pytest.param(2, f"{PP2} {DO} {ASYNC}", marks=SLOW),
        *(pytest.param(2, f"{DO} --architecture {name}", marks=SLOW) for name in CARRYING),
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
