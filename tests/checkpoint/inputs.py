"""What both models read in the tests of trained checkpoints; knows torch alone."""

import torch

MICRO_BATCH, LENGTH, VOCABULARY = 2, 24, 100


def build_ids() -> torch.Tensor:
    """Token ids, [b, s]."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCABULARY, (MICRO_BATCH, LENGTH), generator=generator)
