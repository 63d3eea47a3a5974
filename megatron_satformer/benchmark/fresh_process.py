"""Measures in a process of its own, whose memory no earlier measurement has shaped."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
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
