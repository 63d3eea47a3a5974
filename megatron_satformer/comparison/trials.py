"""Trials: one variant, trained on one task with one seed and learning rate, in its own folder.

A trial that was stopped goes on from its checkpoint; one that is done is not run again, unless it
is asked for with other flags.
"""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_satformer.files.atomic import write_atomically
from megatron_satformer.files.metrics_file import read_metrics
from megatron_satformer.model.variants import Variant
from megatron_satformer.quickstart.process import (
    LIBC,
    PR_SET_PDEATHSIG,
    REPOSITORY,
    VARIABLE,
    end_processes,
)

# One machine: neither its name nor its network has to work.
LAUNCH = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node"
DONE, CHECKPOINTS, LOG = "done.json", "checkpoints", "train.log"
PATIENCE = 30.0  # seconds for torchrun to end its ranks
TOLD = 15  # lines of a log that failed


@dataclass(frozen=True)
class Trial:
    """One run of training.

    Attributes:
        task: name of what it is trained on.
        steps: of training.
        flags: of pretrain_satformer.py, without those of the variant, the seed and the folder.
        ranks: processes.
    """

    task: str
    variant: Variant
    seed: int
    lr: float
    steps: int
    flags: tuple[str, ...]
    ranks: int = 1

    @property
    def name(self) -> str:
        """Also its folder below that of the comparison."""
        return f"{self.task}/{self.variant.name}/lr-{self.lr:g}-seed-{self.seed}"

    def command(self, folder: Path) -> list[str]:
        """Arguments of Python, for a trial whose folder is given."""
        checkpoints = str(folder / CHECKPOINTS)
        every = max(1, self.steps // 2)
        return [
            *f"{LAUNCH} {self.ranks} pretrain_satformer.py".split(),
            *self.flags,
            *self.variant.flags,
            *f"--seed {self.seed} --lr {self.lr:g} --train-iters {self.steps}".split(),
            *("--save", checkpoints, "--load", checkpoints, "--save-interval", str(every)),
            "--allow-fresh-start",  # where the first save was cut off
        ]

    def key(self) -> str:
        """Of everything that says what it computes."""
        words = self.command(Path())
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()


class TrialError(Exception):
    """A trial that failed, with the end of its log."""


def is_done(trial: Trial, root: Path) -> bool:
    """Whether it has been run to its end as it is asked for."""
    try:
        return json.loads((root / trial.name / DONE).read_bytes())["key"] == trial.key()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def run_trials(
    trials: Sequence[Trial],
    root: Path,
    slots: Sequence[dict[str, str]],
    finish: Callable[[Trial, Path], dict[str, Any]],
) -> None:
    """Runs what is not done, as many at once as there are slots, in the order given.

    Args:
        trials: in the order in which they begin.
        root: folder of the comparison.
        slots: environment of each place where a trial can run (its GPUs, its threads).
        finish: called with a trial that has been trained and its folder; measures it. What it
            returns is kept with the trial.

    Raises:
        TrialError: if one fails; the others are ended, and go on when run again.
    """
    end_processes(root)  # of a comparison that was killed
    left = [trial for trial in trials if not is_done(trial, root)]
    if len(left) < len(trials):
        tqdm.write(f"{len(trials) - len(left)} of {len(trials)} trials are done already")
    running: dict[int, _Running] = {}
    begun, count, done = time.monotonic(), len(left), 0
    try:
        while left or running:
            for slot in range(len(slots)):
                if slot not in running and left:
                    running[slot] = _Running(left.pop(0), root, slots[slot])
            time.sleep(0.2)
            for slot, run in [*running.items()]:
                if run.ended():
                    del running[slot]
                    told = run.conclude(finish)
                    done += 1
                    after = _eta(begun, done, count)
                    tqdm.write(f"  [{done}/{count}] {run.trial.name}: {told}{after}")
    finally:
        for run in running.values():
            run.end()


def read_result(trial: Trial, root: Path) -> dict[str, Any]:
    """What `finish` measured of a trial that is done, its curves, and how long it took."""
    folder = root / trial.name
    content = json.loads((folder / DONE).read_bytes())
    records = read_metrics(folder / CHECKPOINTS / "metrics.jsonl")
    return {**content["measured"], **_curves(records), "seconds": content["seconds"]}


def _curves(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    curves: dict[str, Any] = {"train": [], "validation": [], "step_seconds": None, "dead": []}
    seconds = []
    for record in records:
        if record["split"] == "train":
            curves["train"].append([record["step"], record["lm_loss"]])
            seconds.append(record["seconds_per_step"])
        elif record["split"] in ("validation", "final validation"):
            points = [p for p in curves["validation"] if p[0] != record["step"]]
            curves["validation"] = [*points, [record["step"], record["lm_loss"]]]
        elif record["split"] == "gates":
            dead = record["alpha_dead"].values()
            curves["dead"].append([record["step"], sum(dead) / len(dead)])
    if seconds:
        curves["step_seconds"] = sorted(seconds)[len(seconds) // 2]
    return curves


def _eta(begun: float, done: int, total: int) -> str:
    if done == total:
        return ""
    left = (time.monotonic() - begun) / done * (total - done)
    return f"; about {tqdm.format_interval(left)} left"


class _Running:
    """A trial at work."""

    def __init__(self, trial: Trial, root: Path, environment: dict[str, str]) -> None:
        self.trial, self.folder = trial, root / trial.name
        self.begun = time.monotonic()
        key = self.folder / "key"
        if self.folder.exists() and _text(key) != trial.key():
            tqdm.write(f"  {trial.name}: begun anew, its flags have changed")
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(key, trial.key().encode())
        command = [sys.executable, *trial.command(self.folder)]
        with (self.folder / LOG).open("a") as log:
            print(f"$ {shlex.join(command)}", file=log, flush=True)
            self.child = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | environment | {VARIABLE: str(root)},
                start_new_session=True,  # ctrl-C comes to us alone
                preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
            )

    def ended(self) -> bool:
        return self.child.poll() is not None

    def conclude(self, finish: Callable[[Trial, Path], dict[str, Any]]) -> str:
        if self.child.returncode:
            lines = (self.folder / LOG).read_text(errors="replace").splitlines()[-TOLD:]
            raise TrialError(
                f"{self.trial.name} ended with exit code {self.child.returncode}:\n"
                + "\n".join(f"    | {line}" for line in lines)
                + f"\nAll of it: {self.folder / LOG}"
            )
        measured = finish(self.trial, self.folder)
        seconds = time.monotonic() - self.begun
        content = {"key": self.trial.key(), "measured": measured, "seconds": round(seconds, 1)}
        write_atomically(self.folder / DONE, json.dumps(content).encode())
        told = ", ".join(f"{k} {v:.4f}" for k, v in measured.items() if isinstance(v, float))
        return f"{told} in {tqdm.format_interval(seconds)}"

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.child.terminate()
            try:
                self.child.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(self.child.pid, signal.SIGKILL)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
