"""Goes through the steps: reuses what is valid, makes the rest, says what failed and how to go on.

Must not know: what the steps do.
"""

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_satformer.files.atomic import write_atomically
from megatron_satformer.quickstart.console import Console, format_seconds
from megatron_satformer.quickstart.failure import StepError, explain_failure
from megatron_satformer.quickstart.folder import RunFolder, remove
from megatron_satformer.quickstart.process import run_logged
from megatron_satformer.quickstart.stamps import Stamp, Stamps, digest_files, make_key

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Result:
    """What a step says at its end, and the numbers it hands to later steps."""

    says: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One step of the run.

    Attributes:
        name: One word.
        what: What it does, for its header.
        outputs: Files and folders that it makes, by their names in the run's folder.
        run: Does it.
        options: What its outcome depends on besides the steps before.
        prepare: Clears what must not stay and returns where a stopped attempt is taken up, or ""
            for a start from nothing. Default: clear all outputs.
        log: Name of its log.
    """

    name: str
    what: str
    outputs: tuple[str, ...]
    run: Callable[["Job"], Result]
    options: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[["Job"], str] | None = None
    log: str = ""

    @property
    def log_name(self) -> str:
        """Name of its log in the run's folder."""
        return self.log or f"logs/{self.name}.log"


@dataclass
class Job:
    """A step at work.

    Attributes:
        step: The step.
        folder: The run's folder.
        console: Where progress goes.
        facts: Of all the steps before, by name.
        seconds: Of all the steps before, by name.
        damage: What was wrong with the outputs of the last time.
        resumable: Whether an attempt with the same key was begun before.
        earlier_seconds: Time that attempt took.
    """

    step: Step
    folder: RunFolder
    console: Console
    key: str
    facts: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    damage: dict[str, str] = field(default_factory=dict)
    resumable: bool = False
    earlier_seconds: float = 0.0
    start: float = field(default_factory=time.perf_counter)

    @property
    def root(self) -> Path:
        """The run's folder."""
        return self.folder.root

    @property
    def log(self) -> Path:
        """Log of the step."""
        return self.root / self.step.log_name

    @property
    def elapsed(self) -> float:
        """Seconds of the step so far, an earlier attempt that it continues included."""
        return self.earlier_seconds + time.perf_counter() - self.start

    def save_begun(self) -> None:
        """Notes that this attempt has begun, and its time so far, for one that continues it."""
        record = {"key": self.key, "seconds": self.elapsed}
        write_atomically(_begun_path(self.folder, self.step), json.dumps(record).encode())

    def run(
        self,
        command: Sequence[str | Path],
        on_line: Callable[[str], str] | None = None,
        environment: dict[str, str] | None = None,
    ) -> str:
        """Runs a command, its output into the step's log.

        Args:
            command: Program and arguments.
            on_line: Gets each line of output and returns what the live line shall say, "" for what
                it says already. Default: the line itself.
            environment: Variables on top of ours.

        Returns:
            The last line of output.

        Raises:
            StepError: If it ends with another exit code than 0.
        """
        words = [str(word) for word in command]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            log.write(f"$ {shlex.join(words)}\n")
        last, shown = "", "starting"

        def take(line: str) -> None:
            nonlocal last, shown
            last = line.strip() or last
            shown = (last if on_line is None else on_line(line)) or shown
            wait()

        def wait() -> None:
            self.console.live(f"{format_seconds(self.elapsed)}   {shown}")

        code = run_logged(words, self.log, self.root, REPOSITORY, environment or {}, take, wait)
        if code != 0:
            raise StepError(*explain_failure(words, code, self.log))
        return last


def _begun_path(folder: RunFolder, step: Step) -> Path:
    return folder.mark / f"{step.name}.begun"


def _read_begun(folder: RunFolder, step: Step) -> tuple[str, float]:
    try:
        record = json.loads(_begun_path(folder, step).read_bytes())
        return str(record["key"]), float(record["seconds"])
    except (OSError, ValueError, TypeError, KeyError):
        return "", 0.0


def run_steps(steps: Sequence[Step], folder: RunFolder, console: Console) -> int:
    """Brings every step to its end.

    Args:
        steps: In this order; each may read what those before it made.
        folder: Where everything goes.
        console: Where progress goes.

    Returns:
        The exit code: 0, 1 for a failed step, 130 if interrupted, 143 if asked to end.
    """
    stamps = Stamps(folder.root, folder.mark)
    facts: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    before: Stamp | None = None
    redo = False
    for number, step in enumerate(steps, start=1):
        key = make_key(step.name, step.options, before)
        stamp = stamps.read(step.name)
        damage = {} if stamp is None else stamps.damage(stamp)
        if not redo and stamp is not None and stamp.key == key and not damage:
            console.header(number, len(steps), step.name, f"reused: {stamp.says}")
        else:
            console.header(number, len(steps), step.name, step.what)
            if stamp is not None and not redo:
                console.line(f"made again: {_why(damage)}")
            redo = True
            job = Job(step, folder, console, key, facts, seconds, damage)
            try:
                _begin(job, stamps, steps[number - 1 :])
                stamp = _finish(job, stamps)
            except (StepError, OSError, ValueError) as error:
                _tell_failure(job, number, len(steps), error)
                return 1
            except (KeyboardInterrupt, SystemExit) as stop:
                return _tell_stop(job, number, len(steps), stop)
        facts[step.name], seconds[step.name] = stamp.facts, stamp.seconds
        before = stamp
    return 0


def _begin(job: Job, stamps: Stamps, to_redo: Sequence[Step]) -> None:
    """Clears the ground; killed in here, the next run finds this step damaged or not begun."""
    step = job.step
    begun_key, begun_seconds = _read_begun(job.folder, step)
    job.resumable = begun_key == job.key
    taken_up = ""
    if step.prepare is not None:
        taken_up = step.prepare(job)
    else:
        job.folder.clear(step.outputs)
    if taken_up:
        job.earlier_seconds = begun_seconds
        job.console.line(taken_up)
    else:
        remove(job.log)
    stamps.remove(later.name for later in to_redo)
    job.save_begun()


def _finish(job: Job, stamps: Stamps) -> Stamp:
    step = job.step
    result = step.run(job)
    for name in step.outputs:
        if not (job.root / name).exists():
            raise StepError(f"it ended well but made no {name}.", log=job.log)
    made = digest_files(job.root, step.outputs)
    stamp = Stamp(job.key, made, job.elapsed, result.says, result.facts)
    stamps.write(step.name, stamp)
    job.save_begun()
    job.console.line(f"{format_seconds(stamp.seconds)}: {result.says}")
    return stamp


def _why(damage: dict[str, str]) -> str:
    if not damage:
        return "its options, or what it is made from, changed"
    name, wrong = next(iter(damage.items()))
    more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
    return f"{name} {wrong}{more}"


def _tell_failure(job: Job, number: int, total: int, error: Exception) -> None:
    job.console.line()  # ends a live line
    tell = partial(Console(sys.stderr).line, indent=0)
    seconds = format_seconds(time.perf_counter() - job.start)
    tell(f"Step {number} of {total} ({job.step.name}) failed after {seconds}.")
    tell(f"Why: {error}")
    way_out = ""
    if isinstance(error, StepError):
        way_out = error.way_out
        for line in error.excerpt:
            tell(f"    | {line}")
        if error.log is not None:
            tell(f"All of it: {error.log}")
    way_out = way_out or f"put that right and run the same again; {_kept(job.step, number)}"
    tell(f"To go on: {way_out}.")
    tell("To start over: --fresh (make quickstart FRESH=1).")


def _tell_stop(job: Job, number: int, total: int, stop: BaseException) -> int:
    job.console.line()
    Console(sys.stderr).line(
        f"Interrupted in step {number} of {total} ({job.step.name}). Run the same again to go on; "
        f"{_kept(job.step, number)}.",
        indent=0,
    )
    code = stop.code if isinstance(stop, SystemExit) else None
    return code if isinstance(code, int) else 130


def _kept(step: Step, number: int) -> str:
    kept = {1: "nothing is lost", 2: "step 1 is kept"}.get(
        number, f"steps 1 to {number - 1} are kept"
    )
    return kept + (", and this one goes on from where it last saved" if step.prepare else "")
