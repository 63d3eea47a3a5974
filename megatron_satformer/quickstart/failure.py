"""Why a command failed, read from its exit code and the end of its log."""

import re
import signal
from collections.abc import Sequence
from pathlib import Path

TAIL_BYTES = 64_000
EXCERPT_LINES = 12
# An error that ended a Python process. torchrun's own only says that a rank failed.
ERROR = re.compile(
    r"^(?:\[rank\d+\]:)?\s*((?:[\w.]+(?:Error|Exception|Exit))\b.*|(?:\S+: )?error: .*)$"
)
NOT_THE_CAUSE = ("ChildFailedError", "SignalException")
# SIGTERM is what torchrun sends to the ranks that are left.
DEADLY = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
SIGNAL = re.compile(r"[Ss]ignal (\d+) \(SIG\w+\) received")


class StepError(Exception):
    """A step that could not be brought to its end.

    Args:
        reason: Why, in a sentence.
        excerpt: Lines of the log that show it.
        log: The log.
        way_out: What to do about it, if that is known; reads on after "To go on:".
    """

    def __init__(
        self,
        reason: str,
        excerpt: Sequence[str] = (),
        log: Path | None = None,
        way_out: str = "",
    ) -> None:
        super().__init__(reason)
        self.excerpt = list(excerpt)
        self.log = log
        self.way_out = way_out


def explain_failure(command: Sequence[str], code: int, log: Path) -> tuple[str, list[str], Path]:
    """Returns the reason, the lines of the log that show it, and the log.

    Args:
        command: What was run.
        code: Its exit code; negative for a signal.
        log: Its output.
    """
    lines = read_tail(log)
    killed = -code if code < 0 else _signal_of_rank(lines)
    if killed:
        reason = f"{_program(command)} was ended by {signal.Signals(killed).name}"
        if killed == signal.SIGKILL:
            reason += ", perhaps because memory ran out"
        return f"{reason}.", lines[-EXCERPT_LINES:], log
    cause = find_cause(lines)
    if cause is None:
        reason = f"{_program(command)} ended with exit code {code}."
        return reason, lines[-EXCERPT_LINES:], log
    match = ERROR.match(lines[cause])
    reason = lines[cause] if match is None else match[1].strip()
    return reason, lines[max(0, cause + 1 - EXCERPT_LINES) : cause + 1], log


def read_tail(log: Path) -> list[str]:
    """Returns the last lines of a log, from the last command on, without empty ones."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    starts = [n for n, line in enumerate(lines) if line.startswith("$ ")]
    return lines[starts[-1] + 1 :] if starts else lines


def find_cause(lines: Sequence[str]) -> int | None:
    """Returns the index of the first error that ended a process, or None.

    When one rank fails, the others fail after it for want of it: the first one is the cause.
    """
    for n, line in enumerate(lines):
        if ERROR.match(line) and not any(word in line for word in NOT_THE_CAUSE):
            return n
    return None


def _signal_of_rank(lines: Sequence[str]) -> int:
    """Returns the signal that ended a rank, 0 if none did; the errors of other ranks follow it."""
    found = (int(match[1]) for line in lines if (match := SIGNAL.search(line)))
    return next((number for number in found if number in DEADLY), 0)


def _program(command: Sequence[str]) -> str:
    scripts = [word for word in command if word.endswith(".py")]
    if scripts:
        return Path(scripts[-1]).name
    return command[command.index("-m") + 1] if "-m" in command else Path(command[0]).name
