"""The training step: where it goes on, what it runs, and what of its log the user sees."""

import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

from megatron_satformer.analysis.losses import (
    Losses,
    TrainStep,
    parse_train_line,
    parse_valid_line,
    read_log,
)
from megatron_satformer.quickstart.checkpoints import keep_whole, last_step
from megatron_satformer.quickstart.console import format_seconds
from megatron_satformer.quickstart.failure import StepError
from megatron_satformer.quickstart.folder import remove
from megatron_satformer.quickstart.recipe import Recipe, as_flags
from megatron_satformer.quickstart.runner import REPOSITORY, Job, Result

OUTPUTS = ("checkpoints", "tensorboard", "train.log")
DATA = "data/corpus_text_document"
TOKENIZER = "tokenizer/tokenizer.model"
LINE_EVERY = 10  # training steps between two lines where there is no terminal
SAVED = re.compile(r"successfully saved checkpoint from iteration +(\d+)")


def prepare_training(job: Job) -> str:
    """Removes what a stopped attempt left half done; returns where training goes on, or "".

    Training goes on from the newest checkpoint that is whole, provided that the log tells of every
    step before it: the loss curve is a result too.
    """
    history_damaged = any(not name.startswith("checkpoints/") for name in job.damage)
    if job.resumable and not history_damaged:
        damaged = {Path(name).parts[1] for name in job.damage}
        step = keep_whole(job.root / "checkpoints", damaged)
        told = _read_losses(job.log).train
        if step > 0 and all(n in told for n in range(1, step + 1)):
            return f"goes on from the checkpoint of step {step}"
    job.folder.clear(OUTPUTS)
    return ""


def run_training(job: Job, recipe: Recipe) -> Result:
    """Trains to the last step, or on to it, and returns the losses and the speed."""
    done = last_step(job.root / "checkpoints")
    if done < recipe.train_iters or recipe.train_iters not in _read_losses(job.log).valid:
        # Megatron's cache of sample orders; it trusts a file that a kill has cut off.
        remove(job.root / "data" / "cache")
        gpus = count_gpus()
        ranks = 1 if gpus == 1 else 2
        job.console.line(
            f"{ranks} {'GPU' if gpus else 'CPU'} process"
            f"{'es, one pipeline stage each' if ranks > 1 else ''}; Megatron's own output goes to "
            f"{job.log.name}"
        )
        job.run(
            training_command(job.root, recipe, ranks, save=done < recipe.train_iters),
            _Progress(job, recipe).take,
            environment={} if gpus else _cpu_environment(),
        )
    return _result(job, recipe)


def training_command(root: Path, recipe: Recipe, ranks: int, save: bool = True) -> list[str]:
    """Returns the command that trains, or goes on training, in the run's folder.

    Args:
        root: The run's folder.
        recipe: Model and schedule.
        ranks: Number of processes, each a pipeline stage.
        save: Whether to save; not needed to evaluate once more after the last step.
    """
    checkpoints = root / "checkpoints"
    options: dict[str, object] = recipe.training_options() | {
        "pipeline_model_parallel_size": ranks,
        "data_path": root / DATA,
        "data_cache_path": root / "data" / "cache",
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": root / TOKENIZER,
        "load": checkpoints,
        "tensorboard_dir": root / "tensorboard",
    }
    if save:
        options["save"] = checkpoints
    # One machine: neither its name nor its network has to work.
    launch = (
        f"-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node {ranks}"
    )
    script = str(REPOSITORY / "pretrain_satformer.py")
    return [sys.executable, *launch.split(), script, *as_flags(options)]


def count_gpus() -> int:
    """Returns how many GPUs torch can use; torch is asked only where there is a device at all."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return 0
    program = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    return int(answer.stdout) if answer.returncode == 0 else 0


def _cpu_environment() -> dict[str, str]:
    # One thread each: the processes compute at the same time. A higher number from outside stays.
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if Path("/sys/class/net/lo").exists():
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return environment


class _Progress:
    """Turns Megatron's log into the lines and the live line of the console."""

    def __init__(self, job: Job, recipe: Recipe) -> None:
        self.job = job
        self.recipe = recipe
        self.milliseconds: list[float] = []

    def take(self, line: str) -> str:
        """Prints what a line of the log says, if it says something; returns the live text."""
        if (step := parse_train_line(line)) is not None:
            return self._take_step(step)
        if (valid := parse_valid_line(line)) is not None:
            self._tell(valid[0], f"validation loss {valid[1]:.3f}")
        elif (saved := SAVED.search(line)) is not None:
            self._tell(int(saved[1]), "checkpoint saved")
            self.job.save_begun()
        return ""

    def _tell(self, step: int, text: str) -> None:
        width = len(str(self.recipe.train_iters))
        self.job.console.line(f"step {step:>{width}}/{self.recipe.train_iters}   {text}")

    def _take_step(self, step: TrainStep) -> str:
        self.milliseconds.append(step.milliseconds)
        per_step = statistics.median(self.milliseconds[-20:]) / 1e3
        speed = f"{self.recipe.tokens_per_step / per_step:,.0f} tokens/s"
        text = f"loss {step.loss:.3f}   {speed}"
        if step.iteration % LINE_EVERY == 0 or step.iteration in (1, step.total):
            self._tell(step.iteration, f"{text}   {format_seconds(self.job.elapsed)}")
        if step.iteration == step.total:
            return "saving and validating"
        left = format_seconds((step.total - step.iteration) * per_step)
        return f"step {step.iteration}/{step.total}   {text}   about {left} left"


def _read_losses(log: Path) -> Losses:
    if not log.is_file():
        return Losses()
    with log.open(errors="replace") as lines:
        return read_log(lines)


def _result(job: Job, recipe: Recipe) -> Result:
    losses = _read_losses(job.log)
    missing = [n for n in range(1, recipe.train_iters + 1) if n not in losses.train]
    if missing or recipe.train_iters not in losses.valid:
        what = f"a loss for step {missing[0]}" if missing else "a validation loss at the end"
        raise StepError(f"the log has not got {what}.", log=job.log)
    first, final = losses.valid[min(losses.valid)], losses.valid[recipe.train_iters]
    speed = recipe.tokens_per_step / statistics.median(losses.milliseconds.values()) * 1e3
    return Result(
        f"{recipe.train_iters} steps of {recipe.tokens_per_step:,} tokens, {speed:,.0f} tokens/s, "
        f"validation loss {final:.3f}",
        {
            "train_tokens": recipe.train_tokens,
            "tokens_per_second": round(speed, 1),
            "first_val_loss": first,
            "first_val_step": min(losses.valid),
            "final_val_loss": final,
        },
    )
