"""Runs a measurement in a process of its own, whose memory no earlier one has shaped."""

import multiprocessing
from collections.abc import Callable
from typing import Any


def measure_in_own_process(report: Callable[..., None], *args: Any, name: str) -> Any:
    """Returns what `report(sender, *args)` sends from a new process.

    Args:
        report: Importable by name; calls `sender.send(...)` once.
        args: For it; they travel by pickle.
        name: Of what is measured, for the error.

    Raises:
        RuntimeError: If the process ends without sending.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=report, args=(sender, *args))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        raise RuntimeError(f"the process that measures {name} ended without a figure") from None
    process.join()
    return found
