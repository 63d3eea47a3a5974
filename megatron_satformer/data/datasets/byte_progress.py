"""Progress of work over bytes, on stderr: a bar on a terminal, a line now and then in a log."""

import sys

from tqdm import tqdm

# Seconds between two lines in a log, and before the first.
INTERVAL = 10.0
LINE = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left\n"


def byte_progress(what: str, total: int | None, done: int = 0) -> tqdm:
    """Returns what reports how many of `total` bytes are done, and how fast; `what` in one word."""
    # The bar's refresh thread is of no use here: every block refreshes it.
    tqdm.monitor_interval = 0
    in_log = {"bar_format": LINE, "delay": INTERVAL, "mininterval": INTERVAL, "leave": False}
    how = {} if sys.stderr.isatty() else in_log
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, initial=done, **how)
