"""Loss curves from what Megatron leaves behind: TensorBoard event files and its log.

Event files hold exact values, but Megatron's writer brings them to disk every two minutes, so a
killed run loses the last ones; the log has them, one line each. Where a run was resumed, the later
value of a step wins.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

# Tags that Megatron 0.19.2 writes (training_log, evaluate_and_print_results).
TRAIN_TAG, VALID_TAG = "lm loss", "lm loss validation"
NUMBER = r"\S+"
TRAIN_LINE = re.compile(
    rf" iteration +(\d+)/ +(\d+) \|.*elapsed time per iteration \(ms\): ({NUMBER}) \|"
    rf".* lm loss: ({NUMBER}) \|"
)
VALID_LINE = re.compile(
    r" validation loss at iteration (\d+)(?: on validation set)? \|"
    rf".*? lm loss value: ({NUMBER}) \|"
)


@dataclass(frozen=True)
class TrainStep:
    """One training step as Megatron's log tells it; milliseconds is per step, loss in nats."""

    iteration: int
    total: int
    milliseconds: float
    loss: float


@dataclass(frozen=True)
class Losses:
    """Loss in nats per token by training step; milliseconds by training step, from the log."""

    train: dict[int, float] = field(default_factory=dict)
    valid: dict[int, float] = field(default_factory=dict)
    milliseconds: dict[int, float] = field(default_factory=dict)


def parse_train_line(line: str) -> TrainStep | None:
    """Returns what a line of Megatron's log says of a training step, None if it is another line."""
    match = TRAIN_LINE.search(line)
    if match is None:
        return None
    return TrainStep(int(match[1]), int(match[2]), float(match[3]), float(match[4]))


def parse_valid_line(line: str) -> tuple[int, float] | None:
    """Returns step and loss of a validation line of Megatron's log, None if it is another line."""
    match = VALID_LINE.search(line)
    return None if match is None else (int(match[1]), float(match[2]))


def read_log(lines: Iterable[str]) -> Losses:
    """Reads the curves from the lines of Megatron's log."""
    losses = Losses()
    for line in lines:
        if (step := parse_train_line(line)) is not None:
            losses.train[step.iteration] = step.loss
            losses.milliseconds[step.iteration] = step.milliseconds
        elif (valid := parse_valid_line(line)) is not None:
            losses.valid[valid[0]] = valid[1]
    return losses


def read_events(folder: Path) -> Losses:
    """Reads the curves from every event file of a TensorBoard folder; cut-off files too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses = Losses()
    newest: dict[tuple[str, int], float] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        tags = set(events.Tags()["scalars"])
        for tag, curve in ((TRAIN_TAG, losses.train), (VALID_TAG, losses.valid)):
            for event in events.Scalars(tag) if tag in tags else ():
                if event.wall_time >= newest.get((tag, event.step), 0.0):
                    newest[tag, event.step] = event.wall_time
                    curve[event.step] = event.value
    return losses


def read_losses(tensorboard_dir: Path, log: Path | None = None) -> Losses:
    """Reads the curves from the event files and, for steps that those lack, from the log.

    Args:
        tensorboard_dir: As given to --tensorboard-dir.
        log: What the run printed.
    """
    written = Losses()
    if log is not None and log.is_file():
        with log.open(errors="replace") as lines:
            written = read_log(lines)
    events = read_events(tensorboard_dir)
    return Losses(
        train=dict(sorted((written.train | events.train).items())),
        valid=dict(sorted((written.valid | events.valid).items())),
        milliseconds=written.milliseconds,
    )
