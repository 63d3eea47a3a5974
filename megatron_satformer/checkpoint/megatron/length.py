"""How long a run that goes on is, and its learning rates: both in samples, as Megatron keeps them.

An option that counts steps means the samples that it meant when the run began, as long as it is
given unchanged: another batch then changes the steps, not the run. A changed one counts today's
steps from the checkpoint on. Source: get_optimizer_param_scheduler and update_train_iters of
megatron/training/training.py of 0.19.2. Must not know: process groups.
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_satformer.backend.schedule import Continuation
from megatron_satformer.checkpoint.megatron.changes import Change

ARGUMENT = "asked_length"  # of a checkpoint's args: the options as given, and what became of them
LENGTHS = ("train", "lr_decay", "lr_warmup", "lr_wsd_decay")
OPTIONS = tuple(f"{name}_{unit}" for name in LENGTHS for unit in ("iters", "samples"))
# The scheduler's argument -> the option that says it, for those that are no length.
PLAIN = {
    "max_lr": "lr",
    "min_lr": "min_lr",
    "init_lr": "lr_warmup_init",
    "lr_decay_style": "lr_decay_style",
    "lr_wsd_decay_style": "lr_wsd_decay_style",
    "start_wd": "start_weight_decay",
    "end_wd": "end_weight_decay",
    "wd_incr_style": "weight_decay_incr_style",
}
LENGTH_OF = {
    "lr_warmup_steps": "lr_warmup",
    "lr_decay_steps": "lr_decay",
    "wsd_decay_steps": "lr_wsd_decay",
}
RATES = ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr")
OVERRIDE, KEEP = "--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"


@dataclass(frozen=True)
class Length:
    """Of one run.

    Attributes:
        options: Those of OPTIONS and lr_warmup_fraction, as given.
        batch: Samples of its last step.
        end: Samples with which it ends.
        schedule: OptimizerParamScheduler's arguments.
    """

    options: Mapping[str, Any]
    batch: int
    end: int
    schedule: Mapping[str, Any]

    @property
    def unit(self) -> str:
        """What its options count in."""
        return "iters" if self.options["train_iters"] else "samples"


def given_length(args: Namespace) -> dict[str, Any]:
    """The options of a run that say how long it is, as given."""
    options = {name: getattr(args, name, None) for name in (*OPTIONS, "lr_warmup_fraction")}
    if options["train_samples"]:
        options["train_iters"] = None  # where Megatron has counted them
    return options


def length_of(args: Namespace) -> Length:
    """Of a run that begins.

    Args:
        args: Megatron's validated arguments.
    """
    options, batch = given_length(args), args.global_batch_size
    unit = 1 if options["train_samples"] else batch
    kind = "samples" if options["train_samples"] else "iters"
    end = (options[f"train_{kind}"] or 0) * unit
    decay = (options[f"lr_decay_{kind}"] or 0) * unit or end
    fraction, wsd = options["lr_warmup_fraction"], options[f"lr_wsd_decay_{kind}"]
    warmup = (options[f"lr_warmup_{kind}"] or 0) * unit if fraction is None else fraction * decay
    annealed = None if wsd is None else wsd * unit
    return Length(options, batch, end, _schedule(args, end, decay, warmup, annealed))


def _schedule(args: Namespace, end: int, decay: int, warmup: float, wsd: Any) -> dict[str, Any]:
    lengths = {"lr_warmup_steps": warmup, "lr_decay_steps": decay, "wsd_decay_steps": wsd}
    plain = {name: getattr(args, option, None) for name, option in PLAIN.items()}
    return plain | lengths | {"wd_incr_steps": end}


def length_then(saved: Namespace, state: Mapping[str, Any] | None) -> Length:
    """Of the run that saved a checkpoint.

    Args:
        saved: Its args.
        state: Of its scheduler; None where it was not saved.
    """
    recorded = getattr(saved, ARGUMENT, None)
    then = length_of(saved)
    if recorded is not None:
        then = Length(recorded["options"], then.batch, recorded["end"], recorded["schedule"])
    schedule = dict(then.schedule) | {k: v for k, v in (state or {}).items() if k in then.schedule}
    end = then.end if recorded is not None or state is None else schedule["wd_incr_steps"]
    return Length(then.options, then.batch, end, schedule)


def length_now(
    args: Namespace, then: Length, step: int, samples: int, literally: bool = False
) -> Length:
    """Of the run that goes on.

    Args:
        args: Megatron's validated arguments.
        then: From `length_then`.
        step: Steps done.
        samples: Samples done.
        literally: Whether also an option that is given unchanged counts today's steps.
    """
    options, batch = given_length(args), args.global_batch_size

    def unchanged(name: str) -> bool:
        names = (f"{name}_iters", f"{name}_samples")
        return not literally and all(options[n] == then.options[n] for n in names)

    def count(name: str) -> int | None:
        if not (steps := options[f"{name}_iters"]):
            return options[f"{name}_samples"]
        if name == "lr_wsd_decay":
            return int(steps * batch)
        return samples + int(steps - step) * (batch if steps > step else then.batch)

    was = then.schedule
    end = then.end if unchanged("train") else count("train") or then.end
    decay = count("lr_decay") or end
    if unchanged("lr_decay") and (options[f"lr_decay_{_unit(options)}"] or end == then.end):
        decay = was["lr_decay_steps"]
    fraction = options["lr_warmup_fraction"]
    warmup: float = count("lr_warmup") or 0
    if fraction is not None:
        warmup = fraction * decay
        if fraction == then.options["lr_warmup_fraction"] and decay == was["lr_decay_steps"]:
            warmup = was["lr_warmup_steps"]
    elif unchanged("lr_warmup") and then.options["lr_warmup_fraction"] is None:
        warmup = was["lr_warmup_steps"]
    wsd = was["wsd_decay_steps"] if unchanged("lr_wsd_decay") else count("lr_wsd_decay")
    return Length(options, batch, end, _schedule(args, end, decay, warmup, wsd))


def _unit(options: Mapping[str, Any]) -> str:
    return "iters" if options["train_iters"] else "samples"


def record_length(args: Namespace, length: Length) -> None:
    """Notes in the args of a run what it was asked, which Megatron's own arithmetic overwrites."""
    content = {"options": dict(length.options), "end": length.end}
    setattr(args, ARGUMENT, content | {"schedule": dict(length.schedule)})


def find_differences(then: Length, now: Length) -> Iterator[tuple[str, Any, Any]]:
    """Yields option, then and now of what changes a learning rate or weight decay of the rest."""
    was, asked = then.schedule, now.schedule
    constant = asked["lr_decay_style"] == was["lr_decay_style"] == "constant"
    counts = {
        "lr_decay_steps": not constant,
        "init_lr": bool(asked["lr_warmup_steps"] or was["lr_warmup_steps"]),
        "wd_incr_steps": asked["wd_incr_style"] != "constant",
        "min_lr": not constant,
        "end_wd": asked["wd_incr_style"] != "constant",
        "wsd_decay_steps": asked["lr_decay_style"] == "WSD",
        "lr_wsd_decay_style": asked["lr_decay_style"] == "WSD",
    }
    for name, value in asked.items():
        if value != was[name] and counts.get(name, True):
            if name in PLAIN:
                yield PLAIN[name].replace("start_", "").replace("end_", ""), was[name], value
            elif name != "wd_incr_steps":
                option = f"{LENGTH_OF[name]}_{now.unit}"
                if name == "lr_warmup_steps" and now.options["lr_warmup_fraction"] is not None:
                    option = "lr_warmup_fraction"
                yield option, _told(was[name]), _told(value)


def plan(
    args: Namespace, saved: Namespace, state: Mapping[str, Any] | None, step: int, fresh: bool
) -> tuple[Continuation, Length, list[Change]]:
    """Decides how a run goes on, and says what is otherwise than it was.

    Args:
        args: Megatron's validated arguments.
        saved: The checkpoint's.
        state: Of its scheduler; None where it was not saved.
        step: Steps done.
        fresh: Whether the optimizer's state, and with it the scheduler's, is not read.
    """
    samples = getattr(saved, "consumed_train_samples", step * saved.global_batch_size)
    then = length_then(saved, state)
    literally = args.override_opt_param_scheduler
    now = length_now(args, then, step, samples, literally)
    differences = list(find_differences(then, now))
    last = None if args.step_batch_size_schedule else step + max(0, now.end - samples) // now.batch
    changes = list(_length_changes(then, now, step, samples, last))
    options: dict[str, Any] = {}
    if args.use_checkpoint_opt_param_scheduler:
        options = {name: getattr(saved, name, None) for name in RATES}
        now = Length(now.options, now.batch, now.end, dict(then.schedule))
    changes += _schedule_changes(args, differences, step)
    if differences and not (literally or args.use_checkpoint_opt_param_scheduler):
        lead = differences[0]
        if then.end != now.end:
            lead = f"train_{now.unit}", _told_length(then), _told_length(now)
        changes[-1] = replace(changes[-1], refusal=_refuse(*lead))
    known = {name: getattr(saved, name, None) for name in RATES}
    continuation = Continuation(
        step,
        samples,
        (state or {}).get("num_steps", samples),
        now.end,
        last,
        now.schedule,
        options,
        None if fresh else known,
    )
    return continuation, now, changes


def _length_changes(
    then: Length, now: Length, step: int, samples: int, last: int | None
) -> Iterator[Change]:
    told = "" if last is None else f"the last step is {last:,}, "
    if then.batch != now.batch:
        meaning = f"{told}with {now.end:,} samples"
        yield Change("global_batch_size", then.batch, now.batch, meaning)
    if then.end != now.end:
        more, kind = now.end - then.end, "more" if now.end > then.end else "less"
        yield Change(
            f"train_{now.unit}",
            _told_length(then),
            _told_length(now),
            f"{told}{abs(more):,} samples {kind}; the data are drawn in the order of a run of "
            "this length",
        )
    told = _told_length(now)
    if now.end - samples < now.batch:
        done = f"nothing is left to train, {step:,} steps with {samples:,} samples are done"
        yield Change(f"train_{now.unit}", told, told, done)
    elif last is not None and (left := (now.end - samples) % now.batch):
        lost = f"the last {left:,} samples are less than a step, and not trained on"
        yield Change(f"train_{now.unit}", told, told, lost)


def _told(samples: float | None) -> str:
    return "none" if samples is None else f"{samples:,.0f} samples"


def _told_length(length: Length) -> str:
    given = length.options[f"train_{length.unit}"]
    counted = f"{given:,} steps, " if length.unit == "iters" else ""
    return f"{counted}{length.end:,} samples"


def _schedule_changes(
    args: Namespace, differences: list[tuple[str, Any, Any]], step: int
) -> Iterator[Change]:
    if args.override_opt_param_scheduler:
        meaning = f"as asked, from step {step + 1:,} on ({OVERRIDE})"
    elif args.use_checkpoint_opt_param_scheduler:
        meaning = f"the checkpoint's goes on ({KEEP})"
    else:
        meaning = f"refused without {OVERRIDE} or {KEEP}"
    for option, was, asked in differences:
        yield Change(option, was, asked, meaning)


def _refuse(option: str, was: Any, asked: Any) -> Exception:
    return ValueError(
        f"{option} ({asked}) must be that of the checkpoint, which is ({was}), or the run must say "
        f"which schedule it goes on with. Add {OVERRIDE} for the learning rate and weight decay "
        f"that this command line asks for, or {KEEP} for those of the checkpoint."
    )
