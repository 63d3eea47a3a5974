"""What Megatron leaves at None, or divides by, has a default or is one line."""

import pytest

from tests.small import SHAPE


def without(*names):
    kept = list(SHAPE)
    for name in names:
        at = kept.index(name)
        del kept[at : at + 2]
    return kept


LEFT_OUT = {
    "--micro-batch-size": "micro_batch_size (None) must be given: ",
    "--seq-length": "seq_length (None) must be given: ",
    "--num-layers": "num_layers (None) must be given: ",
    "--lr": "lr (None) must be given: ",
}
GIVEN = {
    "--log-interval 0": "log_interval (0) must be at least 1.",
    "--eval-interval -1": "eval_interval (-1) must be at least 0.",
    "--seq-length 0": "seq_length (0) must be at least 1.",
    "--kv-channels 0": "kv_channels (0) must be at least 1.",
    "--num-workers -1": "num_workers (-1) must be at least 0.",
    "--save-params-interval 0": "save_params_interval (0) must be at least 1.",
    "--hidden-size 65": "hidden_size (65) must be a multiple of num_attention_heads (4).",
    "--min-lr 1": "min_lr (1.0) must be at most lr (0.003).",
    "--lr-warmup-init 1": "lr_warmup_init (1.0) must be at most lr (0.003).",
    "--lr-warmup-iters 2": "lr_warmup_iters (2) must be less than lr_decay_iters (2)",
    "--lr-warmup-fraction 1": "lr_warmup_fraction (1.0) must be less than 1.",
    "--lr-decay-style WSD": "lr_decay_style (WSD) must come with lr_wsd_decay_iters (None)",
    "--weight-decay-incr-style linear": "start_weight_decay (None) must be given: weight_decay_",
    "--train-samples 8": "train_iters (2) must not be given with train_samples (8)",
    "--lr-decay-samples 8": "lr_decay_samples (8) must not be given with train_iters (2)",
    "--train-iters 0": "train_iters (0) or train_samples (None) must be given: how long",
    "--save /nowhere": "save (/nowhere) must come with save_interval (None)",
    "--keep-last 2": "keep_last (2) must come with save (None), the folder of the steps.",
    "--save /nowhere --save-interval 2 --keep-last 0": "keep_last (0) must be at least 1.",
    "--save /no --save-interval 2 --keep-last 2 --ckpt-format torch": "keep_last (2) must come "
    "with ckpt_format (torch_dist), not (torch)",
    "--log-progress": "log_progress (True) must come with save (None)",
    "--tokenizer-type NullTokenizer": "vocab_size (None) must be given: tokenizer_type (NullTo",
}


@pytest.mark.parametrize("flag", LEFT_OUT)
def test_what_is_left_out_is_one_line(pretrain, data_flags, flag):
    run = pretrain(1, *without(flag), "--train-iters", 2, *data_flags, code=2)
    assert f"error: {LEFT_OUT[flag]}" in run.output
    assert run.output.count("\n") <= 2


@pytest.mark.parametrize("flags", GIVEN)
def test_what_megatron_cannot_compute_with_is_one_line(pretrain, data_flags, flags):
    run = pretrain(1, *SHAPE, "--train-iters", 2, *data_flags, *flags.split(), code=2)
    assert f"error: {GIVEN[flags]}" in run.output
    assert run.output.count("\n") <= 2


def test_no_length_and_no_tokenizer(pretrain, data_flags):
    assert "must be given: how long to train" in pretrain(1, *SHAPE, *data_flags, code=2).output
    run = pretrain(1, *SHAPE, "--train-iters", 2, "--mock-data", code=2)
    assert "tokenizer_type (None) must be given" in run.output


@pytest.mark.parametrize(
    "given", [[], pytest.param(["--eval-interval", 0], marks=pytest.mark.slow)]
)
def test_without_an_interval_evaluation_is_at_the_end_alone(pretrain, data_flags, given):
    shape = without("--eval-interval", "--max-position-embeddings")
    run = pretrain(1, *shape, "--train-iters", 3, *data_flags, *given)
    assert len(run.losses) == 3
    assert list(run.scalars("lm loss validation")) == [3]
    assert "evaluated at the end alone" in run.output
