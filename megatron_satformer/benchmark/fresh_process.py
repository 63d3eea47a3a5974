"""Measures in a process of its own, whose memory no earlier measurement has shaped."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any


def measure_in_own_process[T](measure: Callable[..., T], *args: Any) -> T:
    """Returns what `measure(*args)` returns in a new process.

    Args:
        measure: Importable by name.
        args: For it; they travel by pickle, as what it returns does.

    Raises:
        BrokenProcessPool: If the process ends without a figure, for lack of memory, say.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, *args).result()


def resident(what: str) -> int:
    """VmRSS, or its peak VmHWM, of this process in bytes; getrusage's includes the parent's."""
    status = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if line.startswith(f"{what}:"))
    return int(line.split()[1]) * 1024
