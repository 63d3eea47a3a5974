"""pretrain_satformer.py itself, on real text: its report, its flags, its help."""

import pytest

from tests.small import PP2, SHAPE


def test_report_and_validation(pretrain, data_flags):
    flags = [*SHAPE, *data_flags, *PP2.split(), "--train-iters", 2, "--eval-interval", 1]
    run = pretrain(2, *flags)
    assert "parameters: 198,080 = 32,768 embeddings + 164,544 layers + 768 value" in run.output
    assert "satformer, 3 of 4 layers mix V1, relu gate" in run.output
    assert "128 elements per row instead of 64 (2.00x)" in run.output
    assert set(run.scalars("lm loss validation")) == {1, 2}


@pytest.mark.parametrize(
    "flags",
    [
        "--attention-backend local",
        "--squared-relu --normalization LayerNorm --add-bias-linear",
        "--no-swiglu --no-qk-layernorm --untie-embeddings-and-output-weights",
        "--reset-attention-mask --reset-position-ids --eod-mask-loss",
        "--position-embedding-type learned_absolute --scaled-output-init",
        "--group-query-attention --num-query-groups 2 --add-qkv-bias --value-gate-bias",
        "--attention-dropout 0.1 --hidden-dropout 0.1 --calculate-per-token-loss",
        "--recompute-granularity selective --rotary-percent 0.5 --rotary-base 50000",
        "--architecture transformer --num-experts 4 --moe-router-topk 2",
        "--optimizer sgd --clip-grad 0.5 --weight-decay 0.0 --lr-decay-style linear",
        "--fp16 --initial-loss-scale 1024",
    ],
)
def test_megatrons_flags_keep_working(pretrain, data_flags, flags):
    run = pretrain(1, *SHAPE, *data_flags, "--train-iters", 3, *flags.split())
    assert len(run.losses) == 3
    assert all(0 < loss < 10 for loss in run.losses)


def test_explicit_flag_wins_over_the_familys_default(pretrain, data_flags):
    run = pretrain(
        1,
        *[*SHAPE, *data_flags, "--train-iters", 1, "--norm-epsilon", 1e-3],
        *["--weight-decay", 0.01, "--adam-beta2", 0.99, "--hidden-dropout", 0.1],
    )
    dump = [line.split() for line in run.output.splitlines() if " ....." in line]
    told = {words[0]: words[-1] for words in dump}
    assert told["layernorm_epsilon"] == "0.001"
    assert told["weight_decay"] == "0.01"
    assert told["adam_beta2"] == "0.99"
    assert told["hidden_dropout"] == "0.1"
    assert told["normalization"] == "RMSNorm"  # not given: the family's


def test_help_has_our_flags_in_one_group(pretrain):
    shown = pretrain(1, "--help", code=0, board=False).output
    group = shown[shown.index("\nsatformer:") :]
    assert "\n\n" not in group[group.index("--architecture") :].rstrip()  # one group, the last
    for flag in (
        *("--architecture", "--value-gate", "--value-gate-bias", "--value-gate-init-std"),
        *("--value-residual-last-k", "--scaled-output-init", "--device", "--no-swiglu"),
    ):
        assert flag in group
