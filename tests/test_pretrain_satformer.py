"""pretrain_satformer.py itself, on real text: its report, its flags, its help."""

import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from megatron_satformer.checkpoint.convert.options import build_hf_config
from megatron_satformer.checkpoint.convert.to_hf import read_state_dict
from megatron_satformer.checkpoint.megatron.reader import open_checkpoint
from tests.checkpoint.hugging_face.test_tokenizer import write_model
from tests.checkpoint.inputs import read_ids
from tests.models import build_twin, twin_class
from tests.small import PP2, SHAPE


def test_report_and_validation(pretrain, data_flags):
    flags = [*SHAPE, *data_flags, *PP2.split(), "--train-iters", 2, "--eval-interval", 1]
    run = pretrain(2, *flags)
    numbers = "198,080 = 32,768 embeddings + 164,544 layers + 768 of satformer alone"
    assert f"parameters: {numbers}" in run.output
    assert "satformer, 3 of 4 layers mix V1, relu gate" in run.output
    assert "payload: 128 (2.00x) elements per row at 1 boundary" in run.output
    assert set(run.scalars("lm loss validation")) == {1, 2}


@pytest.mark.slow
def test_a_tokenizer_that_cannot_be_exported_is_said_before_training(pretrain, tmp_path):
    model = write_model(
        tmp_path / "a.model", user_defined_symbols=["\u2581\u2581"], add_dummy_prefix=False
    )
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
    run = pretrain(1, *SHAPE, "--mock-data", *tokenizer, "--train-iters", 1)
    told, _, after = run.output.partition("> building train, validation, and test datasets")
    assert after
    assert told.count(f"WARNING: tokenizer_model ({model}) has user-defined pieces") == 1


# What the plain twin has an option for, or what must not change what is computed.
EXPRESSIBLE = [
    "",
    "--attention-backend local",
    "--no-qk-layernorm --untie-embeddings-and-output-weights",
    "--group-query-attention --num-query-groups 2 --add-qkv-bias --value-gate-bias",
    "--value-gate softmax --value-residual-last-k 2",
    "--norm-epsilon 1e-2 --rotary-base 50",
    "--architecture resformer --scaled-output-init",
    "--architecture transformer --add-qkv-bias",
    "--architecture meanformer --mean-scale 0.5",
    # These say how it is trained; evaluation has no dropout.
    "--reset-attention-mask --reset-position-ids --eod-mask-loss",
    "--attention-dropout 0.1 --hidden-dropout 0.1 --calculate-per-token-loss",
    "--recompute-granularity selective",
    "--optimizer sgd --lr 0.3 --clip-grad 0.5 --weight-decay 0.0 --lr-decay-style linear",
]


@pytest.mark.parametrize(
    "flags",
    [
        f if f in EXPRESSIBLE[3:10:2] else pytest.param(f, marks=pytest.mark.slow)
        for f in EXPRESSIBLE
    ],
)
def test_megatrons_flags_compute_what_the_twin_does(on_ranks, data_flags, tmp_path, flags):
    """Trained with the flags, then evaluated on text not trained on: logits of the twin."""
    ids = read_ids(Path(data_flags[data_flags.index("--data-path") + 1]))
    torch.save(ids, tmp_path / "ids")
    saving = [*data_flags, "--save", str(tmp_path / "checkpoint"), *flags.split()]
    files = str(tmp_path / "ids"), str(tmp_path / "logits")
    on_ranks(1, "tests.checkpoint.ranks:train", saving, *files)
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    twin = load_twin(checkpoint)
    start = build_twin_like(checkpoint)
    with torch.no_grad():
        logits = twin(ids).logits
        assert (logits - start(ids).logits).abs().max() > 0.1, "training moved nothing"
    got = torch.load(f"{files[1]}.0")[..., : logits.size(-1)]
    torch.testing.assert_close(got, logits, rtol=0, atol=1e-4)  # of a logit, as in exports


def build_twin_like(checkpoint):
    """A twin of the checkpoint's shape with weights of its own."""
    args = checkpoint.args
    config = build_hf_config(args, args.padded_vocab_size)
    names = {field.name for field in fields(twin_class(config.architecture).config_class)}
    shape = {name: getattr(config, name) for name in names - {"rope_theta"}}
    theta = config.rope_parameters["rope_theta"]
    return build_twin(config.architecture, **shape, rope_theta=theta)


def load_twin(checkpoint):
    """The twin of a checkpoint."""
    twin = build_twin_like(checkpoint)
    config = build_hf_config(checkpoint.args, checkpoint.args.padded_vocab_size)
    state = read_state_dict(checkpoint, config, torch.float32)
    left = twin.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert left.missing_keys == ["lm_head.weight"] * config.tie_word_embeddings
    return twin


@pytest.mark.parametrize(
    "flags",
    [
        "--squared-relu --normalization LayerNorm --add-bias-linear",
        pytest.param("--no-swiglu", marks=pytest.mark.slow),
        "--position-embedding-type learned_absolute",
        pytest.param("--rotary-percent 0.5", marks=pytest.mark.slow),
        "--architecture transformer --num-experts 4 --moe-router-topk 2",
        "--fp16 --initial-loss-scale 1024",
    ],
)
def test_megatrons_other_flags_train(pretrain, data_flags, flags):
    """No twin has these: the loss starts at that of a guess and falls."""
    run = pretrain(1, *SHAPE, *data_flags, "--train-iters", 6, *flags.split())
    assert run.losses[0] == pytest.approx(math.log(512), rel=0.1)
    assert run.losses[-1] < run.losses[0] - 0.3


def test_explicit_flag_wins_over_the_familys_default(pretrain, data_flags):
    run = pretrain(
        1,
        *[*SHAPE, *data_flags, "--train-iters", 1, "--norm-epsilon", 1e-3],
        *["--weight-decay", 0.01, "--adam-beta2", 0.99, "--hidden-dropout", 0.1],
    )
    assert " ....." not in run.output
    dump = [line.split() for line in (run.tensorboard / "arguments.txt").read_text().splitlines()]
    told = {words[0]: words[-1] for words in dump}
    assert told["layernorm_epsilon"] == "0.001"
    assert told["weight_decay"] == "0.01"
    assert told["adam_beta2"] == "0.99"
    assert told["hidden_dropout"] == "0.1"
    assert told["normalization"] == "RMSNorm"  # not given: the family's


def test_help_has_our_flags_in_groups(pretrain):
    """What every model has in one, what an architecture has in one of its name."""
    shown = pretrain(1, "--help", code=0, board=False).output
    groups = {part.split(":")[0]: part for part in re.split(r"\n\n(?=\S)", shown)}
    for group, flags in {
        "decoder": "--architecture --scaled-output-init --from-transformer --device --no-swiglu",
        "satformer": "--value-gate --value-gate-bias --value-gate-init-std",
        "meanformer": "--mean-scale --mean-init",
    }.items():
        for flag in flags.split():
            assert flag in groups[group]
    assert len(re.findall("^  --value-residual-last-k", shown, re.MULTILINE)) == 1
    assert "{transformer,resformer,satformer," in groups["decoder"]
