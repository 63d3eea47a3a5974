"""How many samples a run asks of each split, and how many epochs of the data that is.

On plain values. Source: megatron/training/training.py of 0.19.2 (get_train_valid_test_num_samples,
update_train_iters) and megatron/core/datasets (BlendedMegatronDatasetBuilder, GPTDataset).
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Repeating text beyond about this often is known to teach little more (arXiv 2305.16264).
EPOCHS_WORTH = 4
# Of a longer blend, the data sets that are repeated most.
MOST_LINES = 8


@dataclass(frozen=True)
class Share:
    """What one data set gives to one split.

    Attributes:
        option: The flag that names it, as "data_path (prefix)".
        prefix: Its path without `.bin`.
        weight: As given before the prefix, or None.
        tokens: Tokens of one epoch of the split.
    """

    option: str
    prefix: str
    weight: float | None
    tokens: int


@dataclass(frozen=True)
class Served:
    """Samples drawn from one data set, and how many epochs of it they are."""

    prefix: str
    samples: int
    epochs: float


def plan_samples(
    *,
    train_iters: int | None,
    train_samples: int | None,
    global_batch_size: int,
    eval_iters: int,
    eval_interval: int | None,
    eval_global_batch_size: int | None = None,
    start_eval_at_iter: int | None = None,
    full_validation: bool = False,
    skip_train: bool = False,
) -> tuple[int, int | None, int]:
    """Returns the samples that Megatron asks of train, valid and test; None is one epoch.

    Args:
        train_iters: Steps; None where `train_samples` is given.
        train_samples: Samples of the whole training, instead of steps.
        global_batch_size: Samples per step, after any ramp.
        eval_iters: Steps of one evaluation.
        eval_interval: Steps between evaluations.
        eval_global_batch_size: Samples per step of an evaluation; None is `global_batch_size`.
        start_eval_at_iter: Step before which nothing is evaluated.
        full_validation: Whether each evaluation is one epoch.
        skip_train: Whether the run only evaluates.
    """
    steps = train_iters or (train_samples or 0) // global_batch_size
    train = train_samples or steps * global_batch_size
    per_evaluation = eval_iters * (eval_global_batch_size or global_batch_size)
    evaluations = 1
    if not skip_train and eval_interval:
        skipped = (start_eval_at_iter or 0) // eval_interval
        evaluations = max(0, steps // eval_interval + 1 - skipped)
    return train, None if full_validation else evaluations * per_evaluation, per_evaluation


def planned_samples(options: Mapping[str, Any]) -> tuple[int | None, ...] | None:
    """Returns `plan_samples` of a run, or None where the checkpoint or a schedule decides later.

    Args:
        options: Megatron's validated arguments, name -> value.
    """
    if options["phase_transition_iterations"] or options["step_batch_size_schedule"]:
        return None
    names = inspect.signature(plan_samples).parameters
    return plan_samples(**{name: options[name] for name in names})


def samples_per_epoch(tokens: int, sequence_length: int) -> int:
    """Returns the samples in `tokens`, the label of the last token included."""
    return max(0, tokens - 1) // sequence_length


def serve_samples(
    samples: int | None, shares: Sequence[Share], sequence_length: int
) -> list[Served]:
    """Returns what each data set of a blend serves for `samples` samples of the split.

    With weights, or alone, a data set is repeated as often as it takes; of several without weights
    Megatron builds one epoch. A prefix that the blend names several times counts once, with all its
    samples.

    Args:
        samples: Samples wanted; None is one epoch of everything.
        shares: The blend.
        sequence_length: Tokens per sample.
    """
    there = [samples_per_epoch(share.tokens, sequence_length) for share in shares]
    counts: list[float]
    if shares[0].weight is not None and samples is not None:
        total = sum(share.weight or 0.0 for share in shares)
        counts = [samples * (share.weight or 0.0) / total for share in shares]
    elif len(shares) == 1:
        counts = [there[0] if samples is None else samples]
    else:
        part = 1.0 if samples is None else min(1.0, samples / max(1, sum(there)))
        counts = [count * part for count in there]
    served: dict[str, float] = dict.fromkeys((share.prefix for share in shares), 0.0)
    for share, count in zip(shares, counts, strict=True):
        served[share.prefix] += count
    tokens = {share.prefix: share.tokens for share in shares}
    return [
        Served(prefix, round(count), count * sequence_length / tokens[prefix])
        for prefix, count in served.items()
    ]


def check_plan(
    shares: Mapping[str, Sequence[Share]],
    samples: Sequence[int | None],
    sequence_length: int,
    *,
    skip_train: bool = False,
    stops_at_end: bool = True,
) -> list[str]:
    """Checks what the run asks of every split, and returns the lines that state it.

    Args:
        shares: split -> its data sets; none where the split has no data.
        samples: From `plan_samples`.
        sequence_length: Tokens per sample.
        skip_train: Whether the run only evaluates.
        stops_at_end: Whether training dies where the samples end (--dataloader-type single).

    Raises:
        ValueError: "option (value) must ... What to do."
    """
    if not shares["train"] and not skip_train:
        raise ValueError(
            "train_data_path (not given) must be given, or --split must give train a weight: "
            "Megatron would leave at once without training. For evaluation alone, pass "
            "--skip-train."
        )
    evaluates = samples[1] is None or bool(samples[2])
    if not shares["valid"] and evaluates:
        raise ValueError(
            "eval_iters must be 0 where the valid split has no data: Megatron would die at its "
            "first evaluation. Add --eval-iters 0, or give the valid split data."
        )
    lines = []
    for (split, blend), wanted in zip(shares.items(), samples, strict=True):
        if blend:
            stops = stops_at_end and not (split == "train" and skip_train)
            check_samples(split, wanted, blend, sequence_length, stops_at_end=stops)
            lines += describe_samples(split, wanted, serve_samples(wanted, blend, sequence_length))
        else:
            lines.append(f"> {split}: no data")
    named = [share.option for share in shares["train"]]
    for option in dict.fromkeys(option for option in named if named.count(option) > 1):
        lines.append(
            f"WARNING: {option} is named {named.count(option)} times, and each serves the same "
            "samples from the first on: name it once, with the weights added up"
        )
    return lines


def check_samples(
    split: str,
    samples: int | None,
    shares: Sequence[Share],
    sequence_length: int,
    *,
    stops_at_end: bool = True,
) -> None:
    """Refuses a split whose data cannot serve what the run asks of it.

    Args:
        split: "train", "valid" or "test".
        samples: Samples wanted; None is one epoch.
        shares: The data sets of the split, at least one.
        sequence_length: Tokens per sample.
        stops_at_end: Whether training dies where the samples end (--dataloader-type single).

    Raises:
        ValueError: "option (value) must ... What to do."
    """
    for share in shares:
        if share.tokens <= sequence_length:
            raise ValueError(
                f"{share.option} must hold at least one sample, seq_length + 1 = "
                f"{sequence_length + 1} tokens, of the {split} split; it has {share.tokens}. Use "
                "more data, another split, or a shorter --seq-length."
            )
    weighted = shares[0].weight is not None
    if weighted and samples is None:
        raise ValueError(
            f"full_validation (True) must come without weights: {shares[0].option} has the weight "
            f"({shares[0].weight:g}), and one epoch of the {split} split has none. Leave the "
            "weights out, or --full-validation."
        )
    if samples == 0 and (weighted or len(shares) > 1) and split != "train":
        raise ValueError(
            f"eval_iters must ask for samples of the {split} split (0, with --start-eval-at-iter) "
            "where a blend gives it data: Megatron does not start. Give it none (weight 0 in "
            "--split), or evaluate."
        )
    there = sum(samples_per_epoch(share.tokens, sequence_length) for share in shares)
    if not weighted and len(shares) > 1 and stops_at_end and (samples or 0) > there:
        raise ValueError(
            f"{shares[0].option} and what follows it must have weights: the run takes {samples:,} "
            f"samples of the {split} split, and of several data sets without weights Megatron "
            f"serves one epoch, {there:,} samples, and dies in the middle. Put a weight before "
            "each prefix, or train for less."
        )


def describe_samples(split: str, samples: int | None, served: Sequence[Served]) -> list[str]:
    """Returns lines that state what a split serves, and what is repeated too often."""
    if len(served) == 1 or samples is None:
        total = sum(part.samples for part in served)
        names = served[0].prefix if len(served) == 1 else f"{len(served)} data sets"
        epochs = served[0].epochs if len(served) == 1 else 1.0
        lines = [f"> {split}: {total:,} samples = {_epochs(epochs)} of {names}"]
    else:
        lines = [f"> {split}: {samples:,} samples of {len(served)} data sets"]
        ordered = sorted(served, key=lambda part: -part.epochs)
        for part in ordered[:MOST_LINES]:
            lines.append(f">   {part.samples:,} samples = {_epochs(part.epochs)} of {part.prefix}")
        rest = ordered[MOST_LINES:]
        if rest:
            lines.append(f">   {_epochs(rest[0].epochs)} or less of each of {len(rest)} more")
    most = max(served, key=lambda part: part.epochs)
    if split == "train" and most.epochs > EPOCHS_WORTH:
        lines.append(
            f"WARNING: training repeats {most.prefix} {most.epochs:.1f} times; beyond "
            f"{EPOCHS_WORTH} epochs, more data teaches more than more repetition"
        )
    return lines


def _epochs(count: float) -> str:
    return f"{count:.1f} epochs" if count >= 0.1 else f"{count:.2g} epochs"
