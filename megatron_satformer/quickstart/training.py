"""The training step: where it goes on, what it runs, and what of its log the user sees."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_satformer.analysis.losses import parse_train_line, parse_valid_line
from megatron_satformer.quickstart.process import StepError
from megatron_satformer.quickstart.run import INDENT, Run, Stamp, remove

TOKENS_PER_STEP = 8 * 256
LINE_EVERY = 10  # training steps
SAVED = re.compile(r"successfully saved checkpoint from iteration +(\d+)")
# One machine: neither its name nor its network has to work.
LAUNCH = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node"


def resume_training(run: Run, damage: Sequence[str]) -> str:
    """Says at which checkpoint training goes on, if its log and its curves are whole."""
    from megatron_satformer.checkpoint.megatron.recovery import find_start  # torch takes seconds

    for top, *inside in (Path(name).parts for name in damage):
        if top != "checkpoints":
            return ""  # the loss curve is a result too
        remove(run.root / top / inside[0])  # it may be of the right length and yet changed
    step = find_start(run.root / "checkpoints") if run.log.is_file() else 0
    return f"goes on from the checkpoint of step {step}" if step else ""


def train(run: Run) -> str:
    """Trains to the last step, or on to it; returns the last loss."""
    import torch

    gpus = torch.cuda.device_count()
    ranks, device = 1 if gpus == 1 else 2, "GPU" if gpus else "CPU"
    tqdm.write(f"{INDENT}{ranks} x {device}, a pipeline stage each; Megatron prints to train.log")
    # One thread each: the processes compute at the same time. A higher number from outside stays.
    cpu = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "GLOO_SOCKET_IFNAME": "lo"}
    result = ""

    def take(line: str) -> str:
        nonlocal result
        if (step := parse_train_line(line)) is not None:
            speed = TOKENS_PER_STEP / step.milliseconds * 1e3
            told = f"step {step.iteration}/{step.total}   loss {step.loss:.3f}"
            told += f"   {speed:,.0f} tokens/s"
            if step.iteration % LINE_EVERY and step.iteration not in (1, step.total):
                left = (step.total - step.iteration) * step.milliseconds / 1e3
                return f"{told}   about {tqdm.format_interval(left)} left"
        elif (valid := parse_valid_line(line)) is not None:
            told = result = f"step {valid[0]}   validation loss {valid[1]:.3f}"
        elif (saved := SAVED.search(line)) is not None:
            told = f"step {saved[1]}   checkpoint saved"
            run.save_stamp(Stamp(run.stamps[run.step.name].key))
        else:
            return ""
        tqdm.write(f"{INDENT}{told}")
        return told

    layout = f"{ranks} pretrain_satformer.py --pipeline-model-parallel-size {ranks}"
    run.python(f"{LAUNCH} {layout} {run.step.commands}", take, {} if gpus else cpu)
    if not result:
        raise StepError(f"it ended well but {run.log} has no validation loss.")
    return result
