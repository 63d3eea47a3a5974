"""What becomes of the steps in a folder of checkpoints: kept, cleared, set aside while replaced.

A step is whole once it has its `metadata.json`, which is written last and removed first: a kill
at any moment leaves a step that is whole or one that is seen not to be. Must not know: Megatron,
what is in a step.
"""

import os
import shutil
from pathlib import Path

from megatron_satformer.checkpoint.megatron.reader import STEP_FOLDER, list_steps

LAST = "metadata.json"  # of a step's files the last to be written
ASIDE = ".{name}.replaced"


def choose_steps_to_remove(load: Path, step: int, keep_last: int, every: int | None) -> list[Path]:
    """The steps that are no longer wanted, oldest first; torn ones too, links and newer ones not.

    Args:
        load: Folder of checkpoints.
        step: Saved just now.
        keep_last: How many whole steps to keep, this one among them.
        every: Multiples of this are kept besides; None for none.
    """
    folders = {n: load / STEP_FOLDER.format(step=n) for n in list_steps(load) if n <= step}
    whole = [n for n, folder in folders.items() if (folder / LAST).is_file()]
    kept = {*whole[-keep_last:], *(n for n in whole if every and n % every == 0), step}
    return [f for n, f in folders.items() if n not in kept and not f.is_symlink()]


def remove_step(folder: Path) -> None:
    """Removes a step's folder so that a kill in between leaves none that looks whole."""
    (folder / LAST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def make_room(folder: Path) -> None:
    """Lets a step be written where there is one: that is set aside if it is whole, or removed."""
    aside = folder.with_name(ASIDE.format(name=folder.name))
    if not folder.is_dir() or folder.is_symlink():
        return
    if (folder / LAST).is_file():
        remove_step(aside)
        os.replace(folder, aside)
    else:
        remove_step(folder)


def drop_replaced(folder: Path) -> None:
    """Removes what `make_room` has set aside, now that the step is whole."""
    remove_step(folder.with_name(ASIDE.format(name=folder.name)))


def put_back(load: Path) -> list[str]:
    """Puts steps back that were set aside and not replaced in the end.

    Args:
        load: Folder of checkpoints that nobody writes to.

    Returns:
        Their names.
    """
    back = []
    for aside in sorted(load.glob(ASIDE.format(name="iter_*"))):
        folder = load / aside.name.removeprefix(".").removesuffix(".replaced")
        if (folder / LAST).is_file() or not (aside / LAST).is_file():
            remove_step(aside)
            continue
        if folder.exists():
            remove_step(folder)
        os.replace(aside, folder)
        back.append(folder.name)
    return back
