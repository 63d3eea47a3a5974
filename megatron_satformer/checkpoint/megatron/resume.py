"""The one place that compares the run that was with the run that is asked for.

Megatron (0.19.2) compares the shape of the model, and only when it resumes. What it would load as
another model, train for another length or on other data, or fail on rank by rank in the middle of
loading, stands here in a table of option, then, now, and what it means; what must not be is refused
in one line. Must not know: modules, process groups.
"""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_satformer.backend.schedule import Continuation
from megatron_satformer.checkpoint.hugging_face.origin import find_origin
from megatron_satformer.checkpoint.megatron.changes import (
    Change,
    describe_changes,
    first_refusal,
)
from megatron_satformer.checkpoint.megatron.length import length_of, plan, record_length
from megatron_satformer.checkpoint.megatron.other_model import (
    LAYOUT,
    START,
    find_lost_rows,
    find_other_architecture,
    find_other_optimizer,
    find_other_padding,
    find_other_transformer,
    refuse,
)
from megatron_satformer.checkpoint.megatron.reader import (
    RELEASE,
    MegatronCheckpoint,
    open_checkpoint,
)
from megatron_satformer.checkpoint.megatron.recovery import check_fresh_start
from megatron_satformer.checkpoint.megatron.source import (
    Source,
    find_source,
    starts_from_transformer,
)
from megatron_satformer.checkpoint.megatron.training_data import find_data_changes, record_data
from megatron_satformer.checkpoint.megatron.vocabulary import record_vocabulary
from megatron_satformer.model.architectures import find_architecture

# What a run goes on with as asked, to the same numbers up to rounding.
PARALLEL = (
    *LAYOUT[:2],
    "context_parallel_size",
    "expert_model_parallel_size",
    "data_parallel_size",
)
# What takes effect at once: the optimizer's numbers, and what has no state.
OF_OPTIMIZER = ("adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum")
FREE = (
    *("clip_grad", "hidden_dropout", "attention_dropout", "calculate_per_token_loss"),
    "step_batch_size_schedule",
)


@dataclass(frozen=True)
class Resumed:
    """What `check_resume` has found.

    Attributes:
        args: Of the checkpoint; None where there is none of format torch_dist.
        plan: How the run goes on; None where it begins.
    """

    args: Namespace | None = None
    plan: Continuation | None = None


def check_resume(args: Namespace, data: dict[str, Any]) -> Resumed:
    """Compares a run with the checkpoint that it goes on from, and prints what differs.

    What the next comparison needs is noted in its args.

    Args:
        args: Megatron's validated arguments.
        data: What it reads, from `training_data.describe_data`.

    Raises:
        ValueError: naming the option, its value, and the way out.
        NotImplementedError: --from-transformer with an architecture that cannot start as one.
    """
    source = find_source(args)
    record_data(args, data)
    if not args.skip_train:
        record_length(args, length_of(args))
    if args.from_transformer:
        _check_from_transformer(args, source)
    if source is None or source.option != "load":
        check_fresh_start(args)
    if source is None or args.ckpt_format != "torch_dist":
        return Resumed()
    checkpoint = open_checkpoint(source.folder, args.ckpt_step)
    if starts_from_transformer(args):
        changes = [
            *find_other_transformer(args, checkpoint.args, source),
            *find_other_padding(args, checkpoint.args, source),
        ]
        _tell(changes, checkpoint, source)
        return Resumed(checkpoint.args)
    begins = source.weights_only or checkpoint.folder.name == RELEASE
    changes = list(_find_other_model(args, checkpoint, source))
    going_on = None
    if not begins and not args.skip_train:
        going_on, more = _find_other_training(args, checkpoint, source, data)
        changes += more
    _tell(changes, checkpoint, source)
    return Resumed(checkpoint.args, going_on)


def _tell(changes: list[Change], checkpoint: MegatronCheckpoint, source: Source) -> None:
    for change in (c for c in changes if c.then == c.now):
        print(f"WARNING: {change.option} ({change.now}): {change.meaning}.", flush=True)
    if changed := [c for c in changes if c.then != c.now]:
        verb = "starts from" if source.weights_only else "goes on from"
        head = f"the run {verb} step {checkpoint.step:,} of {source}, and asks for something else"
        print(describe_changes(head, changed), flush=True)
    if (refusal := first_refusal(changes)) is not None:
        raise refusal


def _find_other_model(
    args: Namespace, checkpoint: MegatronCheckpoint, source: Source
) -> Iterator[Change]:
    saved = checkpoint.args
    yield from find_other_architecture(args, saved, source)
    if not source.weights_only:
        yield from find_other_padding(args, saved, source)
    yield from find_lost_rows(args, saved, source)


def _find_other_training(
    args: Namespace, checkpoint: MegatronCheckpoint, source: Source, data: dict[str, Any]
) -> tuple[Continuation, list[Change]]:
    saved = checkpoint.args
    changes: list[Change] = []
    if not args.no_load_optim:
        changes += find_other_optimizer(args, saved, source)
    fresh = args.no_load_optim or not checkpoint.has_optimizer
    going_on, length, longer = plan(args, saved, checkpoint.schedule, checkpoint.step, fresh)
    changes += [*longer, *find_data_changes(args, saved, data, going_on.samples)]
    changes += _find_lost_state(args, checkpoint, source, going_on)
    changes += _find_free_changes(args, checkpoint, source)
    record_length(args, length)
    return going_on, changes


def _find_lost_state(
    args: Namespace, checkpoint: MegatronCheckpoint, source: Source, going_on: Continuation
) -> Iterator[Change]:
    """Moments and random numbers that are not there, or not read."""
    saved, step = checkpoint.args, f"step {checkpoint.step:,}"
    if args.no_load_optim:
        then = f"moments of {step}" if checkpoint.has_optimizer else "not saved"
        on = f"fresh moments; the learning rate goes on at sample {going_on.reached:,}"
        yield Change("no_load_optim", then, "none", on)
    elif not checkpoint.has_optimizer:
        refusal = ValueError(
            f"no_load_optim (False) must be given, for {source} was saved without the optimizer's "
            "state (--no-save-optim). Add --no-load-optim to go on with fresh moments, where the "
            "learning rate stopped, or --finetune to begin a new run with its weights."
        )
        yield Change("no_load_optim", "not saved", False, "the moments are gone: refused", refusal)
    elsewhere = any(getattr(args, name) != getattr(saved, name, 1) for name in LAYOUT[:2])
    unsaved = getattr(saved, "no_save_rng", False)
    if unsaved or args.no_load_rng or elsewhere:
        then = "not saved" if unsaved else f"random state of {step}"
        meaning = f"dropout draws as from seed ({args.seed}) at the start"
        yield Change("no_load_rng", then, "none", meaning)


def _find_free_changes(
    args: Namespace, checkpoint: MegatronCheckpoint, source: Source
) -> Iterator[Change]:
    """What takes effect as asked; and the two that cannot."""
    saved, step = checkpoint.args, checkpoint.step
    for option in FREE if args.no_load_optim else (*OF_OPTIMIZER, *FREE):
        then, now = getattr(saved, option, getattr(args, option)), getattr(args, option)
        if then != now:
            yield Change(option, then, now, f"as asked, from step {step + 1:,} on")
    for option in PARALLEL:
        then, now = getattr(saved, option, 1), getattr(args, option)
        if then != now:
            yield Change(option, then, now, "the same numbers up to rounding")
    then, now = saved.global_batch_size, args.global_batch_size
    if args.phase_transition_iterations and then != now:
        told = (
            f"that of {source}, which is ({then}), with phase_transition_iterations "
            f"({args.phase_transition_iterations}): Megatron counts phases in steps. Keep it."
        )
        yield refuse("global_batch_size", then, now, told)
    if args.use_mup and args.override_opt_param_scheduler and not args.no_load_optim:
        for option in ("lr", "min_lr"):
            then, now = getattr(saved, option, None), getattr(args, option)
            if then != now:
                told = (
                    f"that of {source}, which is ({then}), with use_mup (True): the optimizer's "
                    "groups are found by their rates. Keep it, or start with fresh moments "
                    "(--no-load-optim)."
                )
                yield refuse(option, then, now, told)


# Steps that were skipped one after the other until now (--skip-nan-steps).
IN_A_ROW = "skipped_steps_in_a_row"


def hand_on(args: Namespace, saved: Namespace | None, entries: int) -> None:
    """Puts into a run's arguments, and so its checkpoints, what Megatron has no option for.

    Args:
        args: Megatron's validated arguments.
        saved: From `check_resume`.
        entries: Of the run's tokenizer.
    """
    record_vocabulary(args, saved, entries)
    if skipped := getattr(saved, IN_A_ROW, 0):
        setattr(args, IN_A_ROW, skipped)
    if saved is not None and (origin := find_origin(saved)) is not None:
        origin.put_into(args)


def _check_from_transformer(args: Namespace, source: Source | None) -> None:
    reason = find_architecture(args.architecture).from_transformer
    if reason is not None:
        raise NotImplementedError(
            f"from_transformer (True) is not supported with architecture ({args.architecture}): "
            f"{reason}. Leave it out, or use another architecture."
        )
    if source is None:
        raise ValueError(
            f"from_transformer (True) must come with a checkpoint, and load ({args.load}) holds "
            f"none. {START}"
        )
