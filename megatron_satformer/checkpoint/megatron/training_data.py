"""Whether a run that goes on reads the data, through the tokenizer, of the run that was.

What it was is noted in the args that every checkpoint holds. Must not know: tensors.
"""

import hashlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_satformer.checkpoint.hugging_face.tokenizer_source import own_tokenizer_options
from megatron_satformer.checkpoint.megatron.changes import Change
from megatron_satformer.data.datasets.indexed import bin_path
from megatron_satformer.data.preprocess.run_identity import describe_tokenizer
from megatron_satformer.data.training.loss_masks import has_mask, mask_prefix
from megatron_satformer.data.training.preflight import DatasetSummary, DataSummary

ARGUMENT = "training_data"  # of a checkpoint's args
# Options that say which tokens are seen, in which order, and what of them counts.
OPTIONS = {
    "seq_length": "other samples",
    "split": "other documents to train on",
    "seed": "another order",
    "dataloader_type": "another order",
    "mock_data": "other tokens",
    "reset_position_ids": "other positions",
    "reset_attention_mask": "other attention",
    "eod_mask_loss": "another loss",
    "use_loss_masks": "another loss",
}
NAMES = ("data_path", "tokenizer", *OPTIONS)
SAMPLE = 1 << 20  # bytes of each end of a data set that its hash is of


def describe_data(args: Namespace, summary: DataSummary | None) -> dict[str, Any]:
    """What a run reads, for its args.

    Args:
        args: Megatron's validated arguments.
        summary: Of its data; None with --mock-data.
    """
    tokenizer = describe_tokenizer(own_tokenizer_options(args))
    kept = {name: value for name, value in tokenizer.items() if name not in _PLACES}
    sets = [] if summary is None else summary.datasets

    def masked(data: DatasetSummary) -> bool:
        return bool(args.use_loss_masks) and has_mask(data.prefix)

    blend = [
        (
            data.option.split()[0],
            data.weight,
            Path(data.prefix).name,
            data.tokens,
            _hash(data.prefix) + (_hash(mask_prefix(data.prefix)) if masked(data) else ""),
        )
        for data in sets
    ]
    unseen = [] if summary is None else list(summary.unseen)
    return {"blend": [*blend, *unseen], "tokenizer": kept}


_PLACES = ("tokenizer_model", "vocab_file", "merge_file", "packages")


def _hash(prefix: str) -> str:
    digest = hashlib.sha256()
    with bin_path(prefix).open("rb") as file:
        digest.update(file.read(SAMPLE))
        size = file.seek(0, 2)
        file.seek(max(0, size - SAMPLE))
        digest.update(file.read())
    return digest.hexdigest()[:16]


def record_data(args: Namespace, described: dict[str, Any]) -> None:
    """Notes in the args of a run what it reads."""
    setattr(args, ARGUMENT, described)


def find_data_changes(
    args: Namespace, saved: Namespace, described: dict[str, Any], samples: int
) -> Iterator[Change]:
    """Yields what the run reads otherwise than the run that was.

    Args:
        args: Megatron's validated arguments.
        saved: The checkpoint's.
        described: From `describe_data`.
        samples: Samples done.
    """
    known = getattr(saved, ARGUMENT, None)
    allowed = args.allow_data_change or ()
    for option, meaning in OPTIONS.items():
        now = getattr(args, option)
        then = getattr(saved, option, False if isinstance(now, bool) else None)
        if then is not None and then != now:
            yield _change(option, then, now, meaning, allowed, samples)
    if known is None:
        then, now = _paths(saved), _paths(args)
        if then != now:
            yield _change("data_path", then, now, "perhaps other data", allowed, samples)
        return
    if known["blend"] != described["blend"]:
        then, now = _tell_blend(known["blend"]), _tell_blend(described["blend"])
        yield _change("data_path", then, now, "other data", allowed, samples)
    if known["tokenizer"] != described["tokenizer"]:
        then, now = (_tell_tokenizer(one["tokenizer"]) for one in (known, described))
        yield _change("tokenizer", then, now, "ids that mean other text", allowed, samples)


def _change(option: str, then: Any, now: Any, meaning: str, allowed: Any, samples: int) -> Change:
    if option in allowed:
        return Change(option, then, now, f"{meaning}, from sample {samples + 1:,} on (allowed)")
    refusal = ValueError(
        f"{option} ({now}) must be that of the checkpoint, which is ({then}): the run would go on "
        f"with {meaning}. Undo that, or add --allow-data-change {option}."
    )
    return Change(option, then, now, f"{meaning}: refused", refusal)


def _paths(args: Namespace) -> list[str]:
    names = ("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path")
    given = [getattr(args, name, None) or [] for name in (*names, "per_split_data_args_path")]
    return [word for value in given for word in ([value] if isinstance(value, str) else value)]


def _tell_blend(blend: list[Any]) -> str:
    told = []
    for one in blend:
        if isinstance(one, str):
            told.append(one)
        else:
            _, weight, name, tokens, digest = one
            told.append(
                f"{'' if weight is None else f'{weight:g} '}{name}, {tokens:,} tokens, {digest}"
            )
    return "; ".join(told) or "mock data"


def _tell_tokenizer(tokenizer: dict[str, Any]) -> str:
    others = {k: v for k, v in tokenizer.items() if k not in ("tokenizer_type", "sha256")}
    told = [f"{name} {value}" for name, value in others.items()]
    return ", ".join([tokenizer["tokenizer_type"], f"sha256 {tokenizer['sha256'][:12]}", *told])
