"""The comparison: which trials there are, how long they may be, and what came of them.

For every task and variant, one seed is trained at every learning rate of a grid that is the same
for all; the other seeds are trained at the rate whose validation loss was lowest.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_satformer.comparison.tasks import Task
from megatron_satformer.comparison.trials import Trial, read_result, run_trials
from megatron_satformer.model.architectures import find_architecture
from megatron_satformer.model.variants import Variant
from megatron_satformer.quickstart.process import REPOSITORY
from megatron_satformer.sizes import SIZES

FIRST_SEED, PROBE_STEPS = 1, 12
EVALUATIONS = 8  # over training
SPARE = 1.15  # of what the probes say: evaluations, exports, starts


@dataclass(frozen=True)
class CompareOptions:
    """How the variants are compared.

    Attributes:
        size: Shape, batch and schedule, of --model-size.
        seeds: Number of seeds of each variant and task.
        lr_factors: The grid of learning rates, in units of the size's own.
        steps: Of training; as many as fit into budget_minutes if left out.
        budget_minutes: Of the clock, for everything but the cost.
        ranks: Processes of one trial.
        jobs: Trials at a time; as many as there are cores, or GPUs, for if left out.

    Raises:
        ValueError: If one is out of its range.
    """

    size: str = "tiny"
    seeds: int = 3
    lr_factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    steps: int | None = None
    budget_minutes: float = 110.0
    ranks: int = 1
    jobs: int | None = None

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size ({self.size}) must be one of {', '.join(SIZES)}.")
        for name, least in {"seeds": 1, "ranks": 1, "steps": 4, "jobs": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} ({value}) must be at least {least}.")
        if self.budget_minutes <= 0:
            raise ValueError(f"budget_minutes ({self.budget_minutes}) must be above 0.")
        if not self.lr_factors or min(self.lr_factors) <= 0:
            raise ValueError(f"lr_factors ({self.lr_factors}) must be above 0.")

    @property
    def rates(self) -> list[float]:
        """Learning rates of the grid."""
        return [SIZES[self.size].lr * factor for factor in self.lr_factors]


class Comparison:
    """Variants on tasks, in a folder.

    Args:
        root: the folder; what is done there already is kept.
        tasks: by name.
    """

    def __init__(
        self,
        root: Path,
        options: CompareOptions,
        variants: Sequence[Variant],
        tasks: dict[str, Task],
    ) -> None:
        self.root, self.options = root, options
        self.variants, self.tasks = variants, tasks
        self.slots = find_slots(options.ranks, options.jobs)
        self.steps = options.steps or 0

    def run(self) -> dict[str, Any]:
        """Brings every trial to its end; returns what results.json holds, without the cost."""
        if not self.steps:
            self.steps = self._fit_steps()
        rates = self.options.rates
        grid = [self._trial(t, v, r) for t in self.tasks for v in self.variants for r in rates]
        count = len(grid) + len(self.tasks) * len(self.variants) * (self.options.seeds - 1)
        tqdm.write(
            f"{count} trials of {self.steps} steps, {len(self.slots)} at a time: "
            f"{len(self.variants)} variants, {len(self.tasks)} tasks, {len(rates)} learning "
            f"rates, {self.options.seeds} seeds"
        )
        self._bring_about(grid)
        best = {(t, v.name): self._best_rate(t, v) for t in self.tasks for v in self.variants}
        more = [
            self._trial(task, variant, best[task, variant.name], seed)
            for seed in range(FIRST_SEED + 1, FIRST_SEED + self.options.seeds)
            for task in self.tasks
            for variant in self.variants
        ]
        self._bring_about(more)
        return {
            "options": asdict(self.options) | {"steps": self.steps},
            "variants": {v.name: " ".join(v.flags) for v in self.variants},
            "machine": describe_machine(len(self.slots)),
            "tasks": {task: self._results(task, best) for task in self.tasks},
        }

    def _results(self, task: str, best: dict[tuple[str, str], float]) -> dict[str, Any]:
        seeds = range(FIRST_SEED, FIRST_SEED + self.options.seeds)
        return {
            variant.name: {
                "lr": best[task, variant.name],
                "grid": {
                    f"{r:g}": self._result(task, variant, r)["loss"] for r in self.options.rates
                },
                "seeds": {
                    str(seed): self._result(task, variant, best[task, variant.name], seed)
                    for seed in seeds
                },
            }
            for variant in self.variants
        }

    def _result(
        self, task: str, variant: Variant, lr: float, seed: int = FIRST_SEED
    ) -> dict[str, Any]:
        return read_result(self._trial(task, variant, lr, seed), self.root)

    def _best_rate(self, task: str, variant: Variant) -> float:
        return min(self.options.rates, key=lambda rate: self._result(task, variant, rate)["loss"])

    def _bring_about(self, trials: Sequence[Trial]) -> None:
        run_trials(trials, self.root, self.slots, self._measure)

    def _measure(self, trial: Trial, folder: Path) -> dict[str, Any]:
        return self.tasks[trial.task].measure(folder)

    def _trial(
        self, task: str, variant: Variant, lr: float, seed: int = FIRST_SEED, steps: int = 0
    ) -> Trial:
        steps = steps or self.steps
        flags = (
            f"--model-size {self.options.size} --log-interval {max(1, steps // 50)} "
            f"--eval-interval {max(1, steps // EVALUATIONS)} --num-workers 0"
        ).split()
        if "log_gates_interval" in find_architecture(variant.architecture).own_options:
            flags += ["--log-gates-interval", str(max(1, steps // 50))]
        flags += self.tasks[task].flags
        return Trial(task, variant, seed, lr, steps, tuple(flags), self.options.ranks)

    def _fit_steps(self) -> int:
        """Measures a few steps of every variant, and how many of them fit into the budget."""
        first = next(iter(self.tasks))
        probes = [
            self._trial(first, v, self.options.rates[0], steps=PROBE_STEPS) for v in self.variants
        ]
        tqdm.write(f"measuring {PROBE_STEPS} steps of each variant")
        run_trials(probes, self.root / "probes", self.slots, _take_seconds)
        found = [read_result(probe, self.root / "probes") for probe in probes]
        step = statistics.mean(result["step_seconds"] for result in found)
        start = statistics.mean(r["seconds"] - PROBE_STEPS * r["step_seconds"] for r in found)
        trials = (
            len(self.tasks)
            * len(self.variants)
            * (len(self.options.rates) + self.options.seeds - 1)
        )
        each = self.options.budget_minutes * 60 * len(self.slots) / trials / SPARE - start
        steps = int(each / step) // 10 * 10
        if steps < 2 * EVALUATIONS:
            need = (2 * EVALUATIONS * step + start) * SPARE * trials / len(self.slots) / 60
            raise ValueError(
                f"budget_minutes ({self.options.budget_minutes:g}) must be at least {need:.0f} for "
                f"{trials} trials. Give more, or fewer archs, seeds or lr_factors."
            )
        tqdm.write(f"a step takes {step:.2f} s, all else {start:.0f} s: {steps} steps fit")
        return steps


def _take_seconds(trial: Trial, folder: Path) -> dict[str, Any]:
    return {}


def find_slots(ranks: int, jobs: int | None) -> list[dict[str, str]]:
    """The environments in which trials run beside each other: GPUs of their own, or threads.

    Raises:
        ValueError: if there are fewer GPUs than a trial has ranks.
    """
    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        cores = len(os.sched_getaffinity(0))
        count = jobs or max(1, cores // ranks)
        threads = str(max(1, cores // (count * ranks)))
        return [{"OMP_NUM_THREADS": threads, "GLOO_SOCKET_IFNAME": "lo"}] * count
    if gpus < ranks * (jobs or 1):
        raise ValueError(
            f"ranks ({ranks}) times jobs ({jobs or 1}) must be at most the GPUs here ({gpus})."
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(visible[first : first + ranks])}
        for first in range(0, (jobs or gpus // ranks) * ranks, ranks)
    ]


def describe_machine(jobs: int) -> dict[str, Any]:
    """What the figures were measured on, without a name of it."""
    import torch

    gpus = torch.cuda.device_count()
    device = torch.cuda.get_device_name() if gpus else platform.machine()
    packages = ("torch", "megatron-core", "transformers")
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True
    )
    return {
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "trials_at_a_time": jobs,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "revision": revision.stdout.strip() or None,
    }


def measure_cost(root: Path, options: CompareOptions, variants: Sequence[Variant]) -> Any:
    """Step time and peak memory of every variant, interleaved: what tools/benchmark.py writes."""
    target = root / "cost.json"
    if not target.exists():
        size = SIZES[options.size]
        flags = ["--architectures", *(variant.name for variant in variants)]
        for name in (
            *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
            *("seq_length", "micro_batch_size"),
        ):
            flags += [f"--{name.replace('_', '-')}", str(getattr(size, name))]
        flags += ["--num-query-groups", str(size.num_attention_heads)]
        command = [sys.executable, "tools/benchmark.py", *flags, "--json", str(target)]
        tqdm.write("measuring step time and memory")
        subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    return json.loads(target.read_text())
