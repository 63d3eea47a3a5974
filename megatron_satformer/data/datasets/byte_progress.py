"""Progress of work over bytes, on stderr: a bar on a terminal, a line now and then in a log."""

import sys
import time

from tqdm import tqdm

# Seconds between two lines in a log.
INTERVAL = 10.0


class ByteProgress:
    """Reports how many of `total` bytes are done, and how fast.

    Args:
        what: What is being done, in one word.
        total: All the bytes.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = total
        self.done = 0
        self._start = self._last = time.perf_counter()
        self._bar = None
        if sys.stderr.isatty():
            tqdm.monitor_interval = 0
            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=what)

    def advance(self, size: int) -> None:
        """Counts `size` more bytes."""
        self.done += size
        if self._bar is not None:
            self._bar.update(size)
        elif (now := time.perf_counter()) - self._last >= INTERVAL:
            self._last = now
            rate = self.done / (now - self._start)
            left = (self.total - self.done) / rate if rate else 0.0
            print(
                f"{self.what}: {self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB, "
                f"{rate / 1e6:.0f} MB/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> "ByteProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
