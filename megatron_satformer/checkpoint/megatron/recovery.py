"""Goes on from the newest whole step where a kill or a full disk has torn the last one.

Megatron (0.19.2) writes the files of a step and then the tracker, all in place, and trusts the
tracker at the next start: it ends without a word when that is empty, and fails on some rank when
the step is not whole. Nothing is removed here: a torn folder is passed over, and Megatron writes
over it when it saves that step again. Must not know: models, process groups.
"""

import json
import os
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader

from megatron_satformer.checkpoint.megatron.checksums import (
    find_changed_lists,
    find_changed_pieces,
)
from megatron_satformer.checkpoint.megatron.damage import find_damage
from megatron_satformer.checkpoint.megatron.reader import RELEASE, STEP_FOLDER, TRACKER, list_steps
from megatron_satformer.checkpoint.megatron.retention import put_back
from megatron_satformer.files.atomic import write_atomically

WAIT = 120.0  # seconds that a rank leaves to rank 0; reading the lists of a large model takes long
POLL = 0.1
COMMON = "common_state"  # what a checkpoint keeps of its arguments, and all that is no tensor
Keys = Callable[[str], bool]
FRESH = "To start anew at step 0 all the same, add --allow-fresh-start."


@dataclass(frozen=True)
class Recovery:
    """What a run goes on from in place of what the tracker names.

    Attributes:
        torn: What is not whole, a phrase.
        step: Newest whole step; None where no save was ever completed.
    """

    torn: str
    step: int | None


def everything(key: str) -> bool:
    """Of which keys the contents are compared: all."""
    return True


def recover(args: Namespace) -> None:
    """Lets the tracker of --load name a whole step, on rank 0, and says so in one line.

    The other ranks need it where they read the tracker before any process group exists, and then
    wait for rank 0; else they read it long after, in Megatron's load.

    Args:
        args: Megatron's, not yet validated.

    Raises:
        ValueError: If no step is whole, or the one that is asked for is not.
    """
    early = args.use_checkpoint_args or args.from_transformer
    if args.load is None or args.ckpt_format != "torch_dist" or not (args.rank == 0 or early):
        return
    load = Path(args.load)
    if args.rank == 0 and _is_saved_to(args, load):
        for name in put_back(load):
            print(f"WARNING: {load / name} was being written anew, and is as it was.", flush=True)

    # All of a step is read once, on rank 0; the others take its arguments, and no more, this early.
    def compared(key: str) -> bool:
        return args.verify_checkpoint and (args.rank == 0 or key.startswith(COMMON))

    if args.ckpt_step:
        _check_step(load, args.ckpt_step, compared)
    if args.rank != 0:
        _await_rank_0(load, args.ckpt_step, compared)
    elif found := find_recovery(load, args.ckpt_step, args.allow_fresh_start, compared):
        _mend(load, found, args.allow_fresh_start)


def _await_rank_0(load: Path, ckpt_step: int | None, compared: Keys) -> None:
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        found = find_recovery(load, ckpt_step, True, compared)
        if found is None or not found.step:
            return
        time.sleep(POLL)


def _mend(load: Path, found: Recovery, allow_fresh_start: bool) -> None:
    if found.step is None:
        if not allow_fresh_start:
            raise ValueError(
                f"load ({load}) must hold a whole checkpoint: {found.torn}, and no save was "
                f"completed. {FRESH}"
            )
        if (load / TRACKER).exists():
            os.replace(load / TRACKER, load / f"{TRACKER}.torn")
        print(f"WARNING: {found.torn}. No step is whole: the run starts anew.", flush=True)
        return
    try:
        write_atomically(load / TRACKER, str(found.step).encode())
    except OSError as error:
        raise ValueError(
            f"load ({load}) must be writable to be mended ({error.strerror}): {found.torn}. "
            f"Let {TRACKER} in it hold {found.step}, the newest whole step."
        ) from None
    print(
        f"WARNING: {found.torn}. {TRACKER} in {load} now names step {found.step}, the newest whole "
        "one; what is torn stays where it is.",
        flush=True,
    )


def find_recovery(
    load: Path,
    ckpt_step: int | None = None,
    allow_fresh_start: bool = False,
    compared: Keys = everything,
) -> Recovery | None:
    """Looks whether the step that the tracker names can be loaded, and if not, which can.

    Args:
        load: As given to --load.
        ckpt_step: As given to --ckpt-step: then the tracker need only be readable.
        allow_fresh_start: Whether a run may start anew where no step is whole.
        compared: Keys whose contents are read and compared with their checksums.

    Returns:
        None if all is well, or nothing was ever saved there.

    Raises:
        ValueError: If no step is whole though a save was completed.
    """
    tracker = load / TRACKER
    torn = _find_torn(load, ckpt_step, compared)
    if not torn:
        return None
    for step in reversed(list_steps(load)):
        if not find_step_damage(load / STEP_FOLDER.format(step=step), compared):
            return Recovery(torn, step)
    if not tracker.exists() or allow_fresh_start:
        return Recovery(torn, None)
    raise ValueError(
        f"load ({load}) must hold a whole checkpoint: {torn}, and no other step is whole. Copy one "
        f"there again. {FRESH}"
    )


def check_fresh_start(args: Namespace) -> None:
    """Refuses to start at step 0 where a checkpoint was to be read.

    Args:
        args: Megatron's; there is no tracker in --load.

    Raises:
        ValueError: --load is not there, and not where this run saves; or it holds something that is
            no checkpoint, and not this run's.
    """
    if args.load is None or args.allow_fresh_start:
        return
    load = Path(args.load)
    own = _is_saved_to(args, load)
    held = sorted(path.name for path in load.iterdir()) if load.is_dir() else []
    if (load / ".metadata").is_file() or (load / "metadata.json").is_file():
        step = f" --ckpt-step {int(load.name[5:])}" if load.name[5:].isdecimal() else ""
        raise ValueError(
            f"load ({load}) must be the folder that steps are in, and is that of one. Give --load "
            f"{load.parent}{step}."
        )
    saved = [name for name in held if name.startswith("iter_") or name == RELEASE]
    if saved:
        raise ValueError(
            f"load ({load}) must hold a whole checkpoint: it has {saved[-1]} but no {TRACKER}, "
            f"and the run would write over it from step 0 on. Let {TRACKER} name the step. {FRESH}"
        )
    if own or (load.is_dir() and not held):
        return
    if not load.exists():
        raise ValueError(
            f"load ({load}) must be a folder of checkpoints, and there is none. Mend the path. "
            f"{FRESH}"
        )
    kind = "a Hugging Face folder" if "config.json" in held else "none"
    raise ValueError(
        f"load ({load}) must be a folder of checkpoints, and is {kind}: it has neither {TRACKER} "
        f"nor iter_* in it. Mend the path. {FRESH}"
    )


def _is_saved_to(args: Namespace, load: Path) -> bool:
    return args.save is not None and load.resolve() == Path(args.save).resolve()


def find_start(load: Path) -> int:
    """The step that a run goes on from; 0 if there is none, or none is whole."""
    try:
        found = find_recovery(load)
    except ValueError:
        return 0
    if found is not None:
        return found.step or 0
    named = (load / TRACKER).read_text().strip() if (load / TRACKER).exists() else ""
    return int(named) if named.isdecimal() else 0


def _find_torn(load: Path, ckpt_step: int | None, compared: Keys) -> str:
    """What keeps Megatron from loading what the tracker names, a phrase; "" if nothing does."""
    tracker = load / TRACKER
    if not tracker.exists():
        steps = list_steps(load)
        return f"{load} has {STEP_FOLDER.format(step=steps[-1])} but no {TRACKER}" if steps else ""
    try:
        named = tracker.read_text().strip()
    except (OSError, UnicodeError):
        return f"{tracker} cannot be read"
    if named != RELEASE and not named.isdecimal():
        return f"{tracker} must hold a step, not {named!r}"
    if ckpt_step:
        return ""
    folder = load / (named if named == RELEASE else STEP_FOLDER.format(step=int(named)))
    return find_step_damage(folder, compared)


def _check_step(load: Path, step: int, compared: Keys) -> None:
    folder = load / STEP_FOLDER.format(step=step)
    if damage := find_step_damage(folder, compared):
        others = [str(n) for n in list_steps(load) if n != step]
        raise ValueError(
            f"ckpt_step ({step}) must be a whole step of load ({load}): {damage}. Use another of "
            f"its steps ({', '.join(others) or 'there is none'})."
        )


def find_step_damage(folder: Path, compared: Keys = everything) -> str:
    """Says in a phrase what of a saved step is missing, or is not as it was written; or "".

    Args:
        folder: Of the step; the optimizer's state is part of it.
        compared: Keys whose contents are read and compared with their checksums.
    """
    if any(folder.glob("mp_rank_*")):
        return ""  # of a format without such lists, which is told later
    if not folder.is_dir():
        return f"{folder} is missing"
    for name in (".metadata", "metadata.json"):
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
    try:
        json.loads((folder / "metadata.json").read_bytes())
    except ValueError:
        return f"{folder / 'metadata.json'} is cut short"
    try:
        metadata = FileSystemReader(folder).read_metadata()
    except Exception:  # a cut-off pickle may raise anything
        return f"{folder / '.metadata'} is cut short"
    damage = find_damage(folder, metadata)
    if not damage:
        damage = find_changed_lists(folder) or find_changed_pieces(folder, metadata, compared)
    return damage[0] if damage else ""
