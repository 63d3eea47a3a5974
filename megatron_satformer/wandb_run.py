"""A requeued run is one run in wandb: its id lies in the run's folder.

Megatron (0.19.2) calls wandb.init without one, on the last rank; wandb takes it from the
environment. Must not know: models, training.
"""

import os
import secrets
from argparse import Namespace
from pathlib import Path

from megatron_satformer.files.atomic import write_atomically

RUN_ID = "wandb_run_id.txt"


def keep_run_id(preview: Namespace, folder: Path | None) -> None:
    """Gives wandb the id of the run that goes on, or a new one; before Megatron starts it.

    An id that the environment has counts.

    Args:
        preview: from `arguments.preview_arguments`.
        folder: of the run.
    """
    starts_it = preview.wandb_project and preview.rank == preview.world_size - 1
    if not starts_it or folder is None or "WANDB_RUN_ID" in os.environ:
        return
    file = folder / RUN_ID
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, secrets.token_hex(4).encode())
    os.environ["WANDB_RUN_ID"] = file.read_text().strip()
    os.environ.setdefault("WANDB_RESUME", "allow")
