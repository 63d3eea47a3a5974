"""Training on ranks to which something happens, by their own hand: no clock is raced."""

import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
from megatron.training import training

import pretrain_satformer

LONGEST = 0.5  # seconds: some saves of the small model, with the steps between them


def train(argv: list[str], step: int, event: str) -> None:
    """pretrain_satformer.main(), and an event while it trains a step.

    Args:
        argv: Flags.
        step: During which it happens.
        event: "SIGTERM" and the like, to the last rank alone; "touch FILE"; "minutes", that so much
            time has passed; "full N", that the last rank's files may be N bytes long from now on;
            "kill SEED", SIGKILL at a random moment of the saves from the one behind it on.
    """
    what, _, value = event.partition(" ")
    plain_step = training.train_step

    def happen() -> None:
        training.maybe_finalize_async_save(blocking=True)
        if what == "touch":
            Path(value).touch()
        elif what == "kill":
            kill_while_saving(random.Random(value).uniform(0, LONGEST))
        elif os.environ["RANK"] != str(int(os.environ["WORLD_SIZE"]) - 1):
            return
        elif what == "minutes":
            training._TRAIN_START_TIME -= 3600
        elif what == "full":
            # Its worker's too: with --async-save that one writes.
            for process in (own := psutil.Process(), *own.children(recursive=True)):
                limits = int(value), resource.RLIM_INFINITY
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
        else:
            os.kill(os.getpid(), getattr(signal, what))

    def train_step(*args, iteration, **options):
        if iteration + 1 == step:
            happen()
        return plain_step(*args, iteration=iteration, **options)

    training.train_step = train_step
    sys.argv = ["pretrain_satformer.py", *argv]
    pretrain_satformer.main()


def kill_while_saving(seconds: float) -> None:
    """SIGKILL to this process, so long after its next save begins."""
    plain_save = training.save_checkpoint

    def end() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    def save(*args, **options):
        training.save_checkpoint = plain_save
        threading.Thread(target=end, daemon=True).start()
        return plain_save(*args, **options)

    training.save_checkpoint = save
