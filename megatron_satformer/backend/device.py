"""Chooses the device once, at start."""

import torch

from megatron_satformer.backend import (
    cpu,
    dataset_helper,
    distributed_optimizer,
    muon,
    sharded_saves,
)


def choose_device(wanted: str) -> bool:
    """Make `wanted` the device Megatron runs on.

    Args:
        wanted: "auto", "cuda" or "cpu".

    Returns:
        Whether that is CUDA. If not, the CPU backend is active.

    Raises:
        ValueError: CUDA was asked for and there is none.
    """
    found = torch.cuda.is_available()
    if wanted == "cuda" and not found:
        raise ValueError(
            "device (cuda) must be available, but torch finds no GPU. Use --device cpu, or check "
            "the driver and that torch is a CUDA build."
        )
    cuda = found and wanted != "cpu"
    if not cuda:
        cpu.activate()
    dataset_helper.activate()
    distributed_optimizer.activate()
    sharded_saves.activate()
    muon.activate()
    return cuda
