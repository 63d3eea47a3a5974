"""What both models read in the tests of trained checkpoints."""

from pathlib import Path

import numpy as np
import torch

MICRO_BATCH, LENGTH = 2, 24


def read_ids(prefix: Path) -> torch.Tensor:
    """The last tokens of a data set of uint16, which no training step here reads. [b, s]."""
    tokens = np.fromfile(f"{prefix}.bin", dtype=np.uint16)[-MICRO_BATCH * LENGTH :]
    return torch.from_numpy(tokens.astype(np.int64)).view(MICRO_BATCH, LENGTH)
