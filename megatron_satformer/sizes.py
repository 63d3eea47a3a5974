"""Named sizes: shape and recipe, the same for every architecture, as defaults of Megatron's flags.

Source: arXiv 2605.03953, its tables of models and of training. Must not know: modules, process
groups, data files.
"""

import re
from argparse import ArgumentTypeError, Namespace
from dataclasses import dataclass
from typing import Any

# A shorter or longer run than the size's own keeps its share of warmup.
_LENGTHS = ("train_tokens", "train_samples", "train_iters")
_WARMUPS = ("lr_warmup_tokens", "lr_warmup_samples", "lr_warmup_iters", "lr_warmup_fraction")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


@dataclass(frozen=True)
class Size:
    """A shape and how it is trained; fields are Megatron's flags, but for the last two.

    Attributes:
        interval: steps between evaluations, and between saves.
        lr_decay: the highest learning rate over the lowest.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    lr: float
    train_tokens: int
    lr_warmup_tokens: int
    micro_batch_size: int
    interval: int
    kv_channels: int = 64
    seq_length: int = 4096
    global_batch_size: int = 512
    bf16: bool = True  # with fp32 masters
    lr_decay: float = 10.0


SIZES = {
    "tiny": Size(
        *(4, 128, 384, 4, 4e-3, 409_600, 40_960, 8, 50),
        kv_channels=32,
        seq_length=256,
        global_batch_size=8,
        bf16=False,
    ),
    "debug": Size(
        *(4, 256, 768, 4, 2e-3, 409_600, 40_960, 2, 50),
        seq_length=256,
        global_batch_size=8,
        bf16=False,
    ),
    "130m": Size(11, 768, 3072, 12, 2e-3, 5 * 10**9, 5 * 10**7, 8, 250),
    "350m": Size(18, 1024, 4096, 16, 1.5e-3, 10 * 10**9, 10 * 10**7, 8, 500),
    "760m": Size(19, 1536, 6144, 24, 1e-3, 20 * 10**9, 20 * 10**7, 4, 500),
    "1.3b": Size(24, 2048, 5632, 32, 8e-4, 30 * 10**9, 30 * 10**7, 4, 1000),
}


def token_count(text: str) -> int:
    """A number of tokens as flags take it: 5000000000, 5e9 or 5B (K, M, B and T are decimal).

    Raises:
        ArgumentTypeError: it is no whole number above 0.
    """
    match = re.fullmatch(r"(\d+\.?\d*(?:e\+?\d+)?)([kmbt]?)", text.lower().replace("_", ""))
    count = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if count < 1 or not count.is_integer():
        raise ArgumentTypeError(f"({text}) must be a whole number of tokens: 5000000000, 5e9 or 5B")
    return int(count)


def size_defaults(name: str | None) -> dict[str, Any]:
    """What a size sets that depends on no other flag; see `resolve_schedule` for the rest.

    Args:
        name: of SIZES; anything else sets nothing.
    """
    if name not in SIZES:
        return {}
    size = SIZES[name]
    names = """num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels seq_length lr
    micro_batch_size global_batch_size bf16"""
    every = {"eval_interval": size.interval, "eval_iters": 10, "save_interval": size.interval}
    return {name: getattr(size, name) for name in names.split()} | every


def resolve_schedule(args: Namespace) -> dict[str, Any]:
    """Length, warmup and lowest learning rate in Megatron's own flags.

    Tokens become samples of seq_length tokens, rounded down.

    Args:
        args: as parsed, with what `size_defaults` gave; min_lr None where it was not given.

    Returns:
        Defaults for what was not given.

    Raises:
        ValueError: options that contradict each other.
    """
    size = SIZES.get(args.model_size)
    lengths = [name for name in _LENGTHS if getattr(args, name)]
    warmups = [name for name in _WARMUPS if getattr(args, name)]
    for option, given in (("train_tokens", lengths), ("lr_warmup_tokens", warmups)):
        if len(given) > 1:
            one, other = given[:2]
            raise ValueError(
                f"{one} ({getattr(args, one)}) must not be given with {other} "
                f"({getattr(args, other)}): both say the same. Leave one out."
            )
        if option in given and not args.seq_length:
            raise ValueError(
                f"{option} ({getattr(args, option)}) must come with seq_length "
                f"({args.seq_length}), which makes samples of tokens. Add --seq-length."
            )
    defaults: dict[str, Any] = {"min_lr": 0.0}
    if size is not None and args.lr:
        defaults["min_lr"] = args.lr / size.lr_decay
    tokens = args.train_tokens
    if size is not None and not lengths:
        tokens = size.train_tokens
    samples = args.train_samples
    if tokens:
        defaults["train_samples"] = samples = tokens // args.seq_length
    if args.lr_warmup_tokens:
        if not samples:
            raise ValueError(
                f"lr_warmup_tokens ({args.lr_warmup_tokens}) must come with --train-tokens or "
                f"--train-samples, not with train_iters ({args.train_iters}). Use "
                "--lr-warmup-iters."
            )
        defaults["lr_warmup_samples"] = args.lr_warmup_tokens // args.seq_length
    elif size is not None and not warmups:
        share = size.lr_warmup_tokens / size.train_tokens
        if samples:
            own = size.lr_warmup_tokens // args.seq_length
            defaults["lr_warmup_samples"] = int(share * samples) if lengths else own
        else:
            defaults["lr_warmup_iters"] = round(share * args.train_iters)
    _check_lengths(args, defaults)
    return defaults


def _check_lengths(args: Namespace, defaults: dict[str, Any]) -> None:
    samples = defaults.get("train_samples", args.train_samples)
    batch = args.global_batch_size
    if samples and batch and samples < batch and not args.skip_train:
        asked = "train_tokens" if args.train_tokens else "train_samples"
        most = f"{batch} * {args.seq_length} tokens" if args.train_tokens else f"{batch} samples"
        raise ValueError(
            f"{asked} ({getattr(args, asked)}) must be at least one step of global_batch_size "
            f"({batch}): {most}. Train longer, or use a smaller --global-batch-size."
        )
    for unit, length in (("samples", samples), ("iters", args.train_iters)):
        decay = getattr(args, f"lr_decay_{unit}") or length
        name = f"lr_warmup_{unit}"
        warmup = defaults.get(name, getattr(args, name))
        if warmup and decay and warmup >= decay:
            tokens = args.lr_warmup_tokens
            told = f"lr_warmup_tokens ({tokens})" if tokens else f"{name} ({warmup})"
            raise ValueError(
                f"{told} must be less than the decay: {warmup} of {decay} {unit}. Use a shorter "
                "warmup, or train longer."
            )
