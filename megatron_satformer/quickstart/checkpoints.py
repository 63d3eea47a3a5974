"""Which of the checkpoints of a stopped or damaged run can be gone on from."""

import re
from pathlib import Path

from megatron_satformer.files.atomic import write_atomically
from megatron_satformer.quickstart.folder import remove

# Megatron's names (checkpointing.get_checkpoint_name, get_checkpoint_tracker_filename).
ITERATION = re.compile(r"iter_(\d{7})$")
TRACKER = "latest_checkpointed_iteration.txt"


def last_step(checkpoints: Path) -> int:
    """Returns the step of the checkpoint that Megatron would load, 0 if there is none."""
    try:
        return int((checkpoints / TRACKER).read_text())
    except (OSError, ValueError):
        return 0


def keep_whole(checkpoints: Path, damaged: set[str]) -> int:
    """Removes what is not whole, and points Megatron at the newest one that is.

    Args:
        checkpoints: As given to --save.
        damaged: Names of folders in it that are known to be damaged.

    Returns:
        The step of the newest whole checkpoint, 0 if there is none.
    """
    found = {
        int(match[1]): path
        for path in (checkpoints.iterdir() if checkpoints.is_dir() else ())
        if (match := ITERATION.match(path.name))
    }
    for step in sorted(found, reverse=True):
        if found[step].name not in damaged and is_whole(found[step]):
            # Written in place by Megatron, so a kill can leave it empty.
            write_atomically(checkpoints / TRACKER, str(step).encode())
            return step
        remove(found[step])
    return 0


def is_whole(folder: Path) -> bool:
    """Returns whether every byte that the checkpoint's own metadata speaks of is there."""
    from torch.distributed.checkpoint import FileSystemReader

    if not (folder / "metadata.json").is_file():
        return False
    try:
        parts = FileSystemReader(folder).read_metadata().storage_data.values()
    except Exception:  # a cut-off pickle may raise anything
        return False
    ends: dict[str, int] = {}
    for part in parts:
        ends[part.relative_path] = max(part.offset + part.length, ends.get(part.relative_path, 0))
    return bool(ends) and all(
        (folder / name).is_file() and (folder / name).stat().st_size >= end
        for name, end in ends.items()
    )
