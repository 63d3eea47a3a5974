"""A stopped run continues as if it had never stopped; another model is not continued."""

import pytest

from tests.small import DO, PP2, SHAPE


@pytest.mark.parametrize(
    ("ranks", "extra"),
    [(1, ""), (2, f"{PP2} --bf16"), (2, DO), (2, f"{PP2} --attention-dropout 0.1")],
    ids=str,
)
def test_resume_continues_to_the_last_digit(pretrain, data_flags, tmp_path, ranks, extra):
    flags = [*SHAPE, *data_flags, *extra.split(), "--train-iters", 20]
    straight = pretrain(ranks, *flags)
    saving = [*flags, "--save", tmp_path, "--save-interval", 10]
    first = pretrain(ranks, *saving, "--exit-interval", 10)
    second = pretrain(ranks, *saving, "--load", tmp_path)
    assert first.losses + second.losses == straight.losses
    assert first.grad_norms + second.grad_norms == straight.grad_norms


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--architecture resformer", "architecture (resformer) must be that of the checkpoint"),
        ("--value-gate tanh", "value_gate (tanh) must be that of the checkpoint in load"),
        ("--value-residual-last-k 2", "value_residual_last_k (2) must be that of the checkpoint"),
    ],
)
def test_a_checkpoint_is_not_continued_as_another_model(started, pretrain, flags, told):
    common, _ = started("satformer")
    resumed = [flag for flag in common if flag != "--finetune"]
    run = pretrain(1, *resumed, *flags.split(), code=2)
    assert told in run.output
    assert "which is (" in run.output
