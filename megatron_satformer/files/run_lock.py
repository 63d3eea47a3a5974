"""The folder that a run writes into is its own alone.

Must not know: what is written there.
"""

import os
import socket
import time
from datetime import datetime
from pathlib import Path

from megatron_satformer.files.locks import try_lock

LOCK = "run.lock"  # stays where it is; only who has it locked counts
PATIENCE = 10.0  # seconds: a process that was killed just now may still hold it
# A requeued job has nobody to start it again, and a network's file system may be slow to notice
# that a machine is gone.
PATIENCE_IN_A_JOB = 300.0
POLL = 0.5


def claim(save: str | None) -> None:
    """Lets no other run save into a folder until this process ends, however that is.

    Its children do not hold it, so that one which outlives it is in nobody's way. Where the file
    system has no locks this is said, and the run goes on.

    Args:
        save: As given to --save; in an object store it is not locked.

    Raises:
        ValueError: If another run has it.
    """
    if save is None or "://" in save:
        return
    folder = Path(save)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    locked = _await_lock(descriptor, folder)
    if locked is None:
        print(
            f"WARNING: save ({save}) is on a file system without locks: a second run that saves "
            "there would not be noticed.",
            flush=True,
        )
    os.register_at_fork(after_in_child=lambda: os.close(descriptor))
    job = f" of job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = f"process {os.getpid()} on {socket.gethostname()}{job}, since {now}"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, holder.encode(), 0)


def _await_lock(descriptor: int, folder: Path) -> bool | None:
    patience = PATIENCE_IN_A_JOB if "SLURM_JOB_ID" in os.environ else PATIENCE
    deadline = time.monotonic() + patience
    told = False
    while (locked := try_lock(descriptor)) is False:
        holder = os.pread(descriptor, 500, 0).decode(errors="replace")
        if time.monotonic() > deadline:
            os.close(descriptor)
            raise ValueError(
                f"save ({folder}) must be this run's alone, and another saves there: {holder}. "
                "Give another --save, or end that run."
            )
        if not told:
            print(f"> waiting up to {patience:.0f} s for {folder}, held by {holder}", flush=True)
            told = True
        time.sleep(POLL)
    return locked
