"""A run in its folder: reuses the steps that are valid, makes the others, says what failed.

Must not know: what the steps do.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_satformer.files.atomic import write_atomically
from megatron_satformer.files.locks import open_locked
from megatron_satformer.quickstart.process import MARK, StepError, end_processes, run_python

INDENT = " " * 6
OVER = "To start over: --fresh (make quickstart FRESH=1)."
TOLD = re.compile(r"(?: (?:made )?in [\d.]+ s\b|: /| \(largest ).*")  # times, paths: ours to tell


@dataclass(frozen=True)
class Step:
    """One step of a run."""

    name: str
    what: str  # it does, for its header
    outputs: dict[str, str]  # files and folders: name in the run's folder -> what it is
    commands: str  # arguments of Python, joined by " && "; "{root}" stands for the run's folder
    # Runs them, and returns the result in one line.
    work: Callable[["Run"], str] = lambda run: run.python(run.step.commands)
    # Given the damaged files of a stopped attempt, returns where it goes on, "" for from nothing.
    resume: Callable[["Run", Sequence[str]], str] = lambda run, damage: ""


@dataclass
class Stamp:
    """What is known of a step."""

    key: str = ""  # digest of what it is made from
    seconds: float = 0.0  # over all attempts
    says: str = ""
    outputs: dict[str, str] = field(default_factory=dict)  # path -> sha256; none until it is done


class Run:
    """Steps in their order, in a folder that this process alone works in until it ends.

    Raises:
        ValueError: If the folder holds something else, or another quickstart works in it.
    """

    def __init__(self, root: Path, steps: Sequence[Step], fresh: bool = False) -> None:
        self.root, self.steps = root.resolve(), steps
        self.step: Step = steps[0]
        self.stamps: dict[str, Stamp] = {}  # of the steps so far, by name
        self.begun = time.perf_counter()  # of the step at work; earlier where it is continued
        inside = sorted(os.listdir(root)) if root.exists() else []
        if inside and MARK not in inside:
            raise ValueError(
                f"output ({root}) must be a new or empty folder or one that the quickstart made; "
                f"it holds {', '.join(inside[:3])}. Choose another with --output."
            )
        (self.root / MARK).mkdir(parents=True, exist_ok=True)
        busy = f"output ({root}) is in use by another quickstart. Wait for it, or choose another."
        self.lock = open_locked(self.root / MARK / "lock", os.O_RDWR | os.O_CREAT, busy)
        end_processes(self.root)  # of a run that was killed
        if fresh:
            names = ["logs", *(name for step in steps for name in step.outputs)]
            remove(*(self.root / name for name in names), *self.root.glob(f"{MARK}/*.json"))

    @property
    def log(self) -> Path:
        """Log of the step at work: one of its outputs, or else in a folder of its own."""
        name = f"{self.step.name}.log"
        return self.root / (name if name in self.step.outputs else f"logs/{name}")

    def go(self) -> int:
        """Brings every step to its end; returns the exit code (1 for a failed step)."""
        made_from: list[object] = []
        for number, step in enumerate(self.steps, start=1):
            self.step = step
            header = f"[{number}/{len(self.steps)}] {step.name:<11}"
            place = f"{number} of {len(self.steps)} ({step.name})"
            again = "run again; the steps before it, and what it has saved, are kept"
            try:
                stamp = self._bring_about(header, made_from)
            except (StepError, OSError, ValueError) as error:
                seconds = tqdm.format_interval(time.perf_counter() - self.begun)
                print(f"\nStep {place} failed after {seconds}.\nWhy: {error}", file=sys.stderr)
                print(f"To go on: put that right and {again}.\n{OVER}", file=sys.stderr)
                return 1
            except (KeyboardInterrupt, SystemExit) as stop:
                print(f"\nInterrupted in step {place}. To go on: {again}.", file=sys.stderr)
                return 143 if isinstance(stop, SystemExit) else 130
            made_from = [stamp.key, stamp.outputs]
        return 0

    def _bring_about(self, header: str, made_from: list[object]) -> Stamp:
        step = self.step
        self.begun = time.perf_counter()
        content = json.dumps([step.name, step.commands, made_from], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()
        try:
            earlier = Stamp(**json.loads((self.root / MARK / f"{step.name}.json").read_bytes()))
        except (OSError, ValueError, TypeError):
            earlier = Stamp()
        now = _digest(self.root, earlier.outputs)
        damage = [name for name, was in earlier.outputs.items() if now.get(name) != was]
        if earlier.outputs and earlier.key == key and not damage:
            tqdm.write(f"{header}reused: {earlier.says}")
            self.stamps[step.name] = earlier
            return earlier
        tqdm.write(f"{header}{step.what}")
        if earlier.outputs:
            why = f"{damage[0]} is missing or was" if damage else "its options or its input were"
            tqdm.write(f"{INDENT}made again: {why} changed")
        goes_on = step.resume(self, damage) if earlier.key == key else ""
        if goes_on:
            tqdm.write(f"{INDENT}{goes_on}")
            self.begun -= earlier.seconds
        else:
            remove(*(self.root / name for name in step.outputs), self.log)
        self.save_stamp(Stamp(key))
        says = TOLD.sub("", step.work(self))
        for name in step.outputs:
            if not (self.root / name).exists():
                raise StepError(f"it ended well but made no {name}.")
        stamp = Stamp(key, says=says, outputs=_digest(self.root, step.outputs))
        self.save_stamp(stamp)
        tqdm.write(f"{INDENT}{tqdm.format_interval(stamp.seconds)}   {says}")
        return stamp

    def save_stamp(self, stamp: Stamp) -> None:
        """Notes how far the step at work is, with the time that it took so far."""
        stamp.seconds = time.perf_counter() - self.begun
        self.stamps[self.step.name] = stamp
        content = json.dumps(asdict(stamp), indent=1).encode()
        write_atomically(self.root / MARK / f"{self.step.name}.json", content)

    def python(self, commands: str, *more: Any) -> str:
        """Runs them; "{seconds}" are those of the steps done. For more see `run_python`."""
        seconds = {n: round(s.seconds, 2) for n, s in self.stamps.items() if s.outputs}
        values = {"root": self.root, "seconds": json.dumps(seconds)}
        for command in commands.split(" && "):
            words = [word.format(**values) for word in shlex.split(command)]
            says = run_python(words, self.log, self.root, *more)
        return says


def list_files(root: Path, names: Iterable[str]) -> list[Path]:
    """Lists the files that these names in the folder, of files or folders, stand for."""
    paths = (path for name in names for path in (root / name, *(root / name).rglob("*")))
    return [path for path in paths if path.is_file()]


def _digest(root: Path, names: Iterable[str]) -> dict[str, str]:
    files = list_files(root, names)
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def remove(*paths: Path) -> None:
    """Removes files, links and whole folders, if they are there; never follows a link."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
