"""The folder that a run saves into, before it begins: its own alone, and large enough.

Must not know: process groups, what is in a checkpoint.
"""

import os
import shutil
import socket
import time
from argparse import Namespace
from datetime import datetime
from pathlib import Path

from megatron_satformer.config import DecoderConfig
from megatron_satformer.files.locks import try_lock
from megatron_satformer.model.parameters import count_parameters

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


def expected_bytes(args: Namespace, config: DecoderConfig) -> int:
    """About what a checkpoint takes on disk: weights, master weights, the optimizer's moments.

    Args:
        args: Megatron's validated arguments.
        config: Of the model.
    """
    learned = args.position_embedding_type == "learned_absolute"
    count = count_parameters(
        config,
        args.padded_vocab_size,
        share_embeddings=not args.untie_embeddings_and_output_weights,
        learned_positions=args.max_position_embeddings if learned else 0,
    )
    each = args.params_dtype.itemsize
    if not args.no_save_optim:
        moments = {"adam": (args.exp_avg_dtype, args.exp_avg_sq_dtype), "sgd": ()}
        # Of others at least one moment; what is less than sure must not refuse a run.
        each += sum(kind.itemsize for kind in moments.get(args.optimizer, (args.exp_avg_dtype,)))
        each += args.main_params_dtype.itemsize if args.bf16 or args.fp16 else 0
    return count.total * each


def check_room(args: Namespace, config: DecoderConfig) -> None:
    """Looks whether the disk of --save has room for a checkpoint, and for those to come.

    Args:
        args: Megatron's validated arguments.
        config: Of the model.

    Raises:
        ValueError: If not one fits.
    """
    if args.save is None or "://" in args.save or config.multi_latent_attention:
        return
    size, free = expected_bytes(args, config), shutil.disk_usage(args.save).free
    told = f"a checkpoint takes about {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free"
    if size > free:
        raise ValueError(
            f"save ({args.save}) must be on a disk with room for a checkpoint: {told}. Make room, "
            "or give another --save."
        )
    steps = args.train_iters or (args.train_samples or 0) // args.global_batch_size
    saves = max(1, steps // args.save_interval)
    kept = args.keep_last + 1 if args.keep_last else 2 if args.save_retain_interval else saves
    if args.save_retain_interval:
        kept += steps // args.save_retain_interval
    if min(kept, saves) * size > free:
        print(
            f"WARNING: save ({args.save}): {told}; this run saves {saves} and keeps "
            f"{min(kept, saves)} at once. --keep-last N keeps fewer.",
            flush=True,
        )
