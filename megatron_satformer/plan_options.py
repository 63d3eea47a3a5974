"""The flags of a plan."""

from dataclasses import dataclass


@dataclass
class PlanOptions:
    """Options of --dry-run."""

    dry_run: bool = False
    """Check everything that a run checks, print what it will need and take, and end: no process
    group, no GPU, nothing written. One process plans for all --gpus."""

    search: bool = False
    """With --dry-run: try layouts of --gpus as well, list the best that fit, and why others do
    not."""

    gpus: int | None = None
    """With --dry-run: how many GPUs the run will have; left out: as many as processes."""

    gpu: str = "h100"
    """With --dry-run: which GPU."""

    gpu_memory: float | None = None
    """With --dry-run: GB (10^9 bytes) that a GPU may be filled to; left out: what its name says.
    Cards have some percent more, which CUDA and NCCL take."""

    utilization: float | None = None
    """With --dry-run: model FLOPs utilization (MFU) of a GPU that waits for no other; left out: as
    measured on one H200 (docs/performance.md). An assumption, and the plan says so."""
