"""Named sizes through the real parser: what they set, what wins over them, what is refused."""

import re
import sys

import pytest

from megatron_satformer import arguments
from megatron_satformer.sizes import SIZES, token_count


@pytest.fixture
def resolve(monkeypatch):
    """Flags -> the arguments that training would validate."""

    def parse(flags):
        monkeypatch.setattr(sys, "argv", ["pretrain_satformer.py", *flags.split()])
        args = arguments.preview_arguments()
        given = arguments.resolve_defaults(args, cuda=False)
        return arguments.parse_args(
            extra_args_provider=lambda parser: arguments.add_arguments(parser, given)
        )

    return parse


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--model-size 130m --hidden-size 512", {"hidden_size": 512, "num_layers": 11}),
        ("--hidden-size 512 --model-size 130m", {"hidden_size": 512, "num_layers": 11}),
        ("--model-size=1.3b", {"num_attention_heads": 32, "ffn_hidden_size": 5632, "bf16": True}),
        ("--model-size 130m --fp16", {"bf16": False, "fp16": True}),
        ("--model-size 130m --no-bf16", {"bf16": False}),
        ("--model-size 130m --lr 1e-3", {"lr": 1e-3, "min_lr": 1e-4}),
        ("--model-size 130m --lr 1e-3 --min-lr 0", {"lr": 1e-3, "min_lr": 0.0}),
        ("--lr 1e-3", {"lr": 1e-3, "min_lr": 0.0, "train_samples": None, "bf16": False}),
        ("--model-size 130m --seq-length 2048", {"max_position_embeddings": 2048}),
        # The published length at another sequence length: more samples, the same tokens.
        (
            "--model-size 130m --seq-length 2048",
            {"train_samples": 5 * 10**9 // 2048, "lr_warmup_samples": 5 * 10**7 // 2048},
        ),
        # Another length: the size's share of warmup.
        (
            "--model-size 130m --train-tokens 1B",
            {"train_samples": 10**9 // 4096, "lr_warmup_samples": 10**7 // 4096},
        ),
        (
            "--model-size 130m --train-iters 300",
            {"train_iters": 300, "train_samples": None, "lr_warmup_iters": 3},
        ),
        (
            "--model-size 130m --train-iters 300 --lr-warmup-fraction 0.5",
            {"lr_warmup_iters": 0, "lr_warmup_fraction": 0.5},
        ),
        (
            "--model-size 130m --train-samples 10000 --lr-warmup-samples 7",
            {"train_samples": 10000, "lr_warmup_samples": 7},
        ),
        (
            "--train-tokens 5e6 --lr-warmup-tokens 1M --seq-length 100",
            {"train_samples": 50_000, "lr_warmup_samples": 10_000},
        ),
    ],
)
def test_what_wins(resolve, flags, expected):
    args = resolve(flags)
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--train-tokens 5B", "train_tokens (5000000000) must come with seq_length (None)"),
        (
            "--model-size 130m --train-tokens 5B --train-iters 9",
            "train_tokens (5000000000) must not be given with train_iters (9)",
        ),
        (
            "--model-size 130m --train-iters 9 --train-samples 7",
            "train_samples (7) must not be given with train_iters (9)",
        ),
        (
            "--model-size 130m --lr-warmup-tokens 1M --lr-warmup-iters 9",
            "lr_warmup_tokens (1000000) must not be given with lr_warmup_iters (9)",
        ),
        (
            "--model-size 130m --train-iters 9 --lr-warmup-tokens 1M",
            "lr_warmup_tokens (1000000) must come with --train-tokens or --train-samples, not with "
            "train_iters (9)",
        ),
        (
            "--model-size 130m --train-tokens 1M",
            "train_tokens (1000000) must be at least one step of global_batch_size (512)",
        ),
        (
            "--model-size 130m --lr-warmup-tokens 5B",
            "lr_warmup_tokens (5000000000) must be less than the decay: 1220703 of 1220703",
        ),
        ("--train-iters 9 --lr-warmup-iters 9", "lr_warmup_iters (9) must be less than the decay"),
    ],
)
def test_what_is_refused(resolve, flags, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        resolve(flags)


@pytest.mark.parametrize("flags", ["--model-size 13b", "--train-tokens 5X", "--train-tokens 1.5"])
def test_what_is_no_size_or_number(resolve, flags):
    with pytest.raises(ValueError, match=f"^argument {flags.split()[0]}"):
        resolve(flags)


def test_token_counts():
    texts = ("5000000000", "5e9", "5B", "5b", "5_000_000_000", "0.005T", "5000M")
    assert {token_count(text) for text in texts} == {5 * 10**9}


def test_equal_terms():
    """Published sizes differ in nothing but what the tables give each."""
    published = [size for name, size in SIZES.items() if name not in ("tiny", "debug")]
    for name in ("kv_channels", "seq_length", "global_batch_size", "bf16", "lr_decay"):
        assert len({getattr(size, name) for size in published}) == 1
