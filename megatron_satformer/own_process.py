"""Runs a measurement in a process of its own, so that no other model's memory is in its figure."""

import multiprocessing
from collections.abc import Callable
from typing import Any


def measure_in_own_process(report: Callable[..., None], *args: Any, name: str) -> float:
    """Returns the one figure that `report(sender, *args)` sends from a new process.

    Args:
        report: Importable by name; calls `sender.send(figure)` once.
        args: For it; they travel by pickle.
        name: Of what is measured, for the error.

    Raises:
        RuntimeError: If the process ends without a figure.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=report, args=(sender, *args))
    process.start()
    sender.close()
    try:
        figure: float = receiver.recv()
    except EOFError:
        raise RuntimeError(f"the memory run of {name} ended without a figure") from None
    process.join()
    return figure
