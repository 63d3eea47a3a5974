"""Megatron's options that change attention itself, with V1, cut over ranks."""

import pytest

from tests.parallel.layouts import LONG
from tests.small import PP2, RTOL, SP, TP2

GQA = "--group-query-attention --num-query-groups 2"
MODELS = {
    "output gate": f"--attention-output-gate {GQA}",
    "window and sinks": "--attention-backend local --window-size 8,0 --softmax-type learnable",
    "no RoPE in two layers, muP": "--no-rope-freq [0,1,0,1] --use-mup --scaled-output-init",
}


FAST = "window and sinks"


@pytest.mark.parametrize(
    "model", [m if m == FAST else pytest.param(m, marks=pytest.mark.slow) for m in MODELS]
)
def test_layout_equals_one_rank(started, pretrain, model):
    flags, one = started("satformer", MODELS[model])
    run = pretrain(4, *flags, *f"{TP2} {PP2} {SP}".split())
    assert run.losses == pytest.approx(one.losses, rel=RTOL)
    assert run.grad_norms == pytest.approx(one.grad_norms, rel=RTOL)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, "--recompute-granularity selective --recompute-modules mlp core_attn"),
        (1, "--mlp-chunks-for-training 2"),
        (
            2,
            f"{TP2} --recompute-granularity full --recompute-method uniform "
            "--recompute-num-layers 2 --distribute-saved-activations",
        ),
    ],
    ids=str,
)
def test_what_saves_memory_changes_nothing(started, pretrain, ranks, flags):
    common, one = started("satformer")
    run = pretrain(ranks, *common, *flags.split())
    assert run.losses == pytest.approx(one.losses, rel=RTOL)
    assert run.grad_norms == pytest.approx(one.grad_norms, rel=RTOL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", ["--reset-attention-mask --reset-position-ids", "--window-size 8,0"]
)
def test_what_is_read_is_what_megatrons_own_mask_lets_through(started, pretrain, option):
    # Learned positions tell where a document begins. Adam would make steps of rounding.
    model = f"{LONG} --optimizer sgd --position-embedding-type learned_absolute"
    flags, one = started("satformer", f"{option} {model}")
    own = pretrain(1, *flags, "--attention-backend", "local")
    assert own.losses == pytest.approx(one.losses, rel=RTOL)
    assert own.grad_norms == pytest.approx(one.grad_norms, rel=RTOL)
    without = [flag for flag in flags if flag not in option.split()]
    everything = pretrain(1, *without)
    assert everything.losses != pytest.approx(one.losses, rel=10 * RTOL)
    if "--reset-attention-mask" in flags:
        apart = pretrain(1, *without, "--dataloader-inter-document-masking")
        assert apart.losses == one.losses
