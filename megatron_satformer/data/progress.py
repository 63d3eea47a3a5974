"""Progress of long work over files: a bar on a terminal, a line now and then in a log."""

import sys
import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Reports documents, MB/s and tokens/s on stderr.

    Args:
        total_bytes: Size of the input on disk.
        log_interval: Documents between two reports.
    """

    def __init__(self, total_bytes: int, log_interval: int) -> None:
        self.log_interval = log_interval
        self.documents = 0
        self.bytes = 0
        self.tokens = 0
        self._start = time.perf_counter()
        self._next = log_interval
        self._bar = None
        if sys.stderr.isatty():
            # The bar's refresh thread is of no use here: every chunk refreshes it.
            tqdm.monitor_interval = 0
            self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenizing")

    def advance(self, documents: int, size: int, tokens: int, file_bytes: int) -> None:
        """Counts finished work.

        Args:
            documents: Documents.
            size: Their bytes, uncompressed.
            tokens: Their tokens.
            file_bytes: Bytes of the input files on disk that they took.
        """
        self.documents += documents
        self.bytes += size
        self.tokens += tokens
        if self._bar is not None:
            self._bar.update(file_bytes)
        if self.documents >= self._next:
            self._next = self.documents - self.documents % self.log_interval + self.log_interval
            if self._bar is not None:
                self._bar.set_postfix_str(self._rates(), refresh=False)
            else:
                print(f"Processed {self._rates()}", file=sys.stderr, flush=True)

    def _rates(self) -> str:
        seconds = max(time.perf_counter() - self._start, 1e-9)
        return (
            f"{self.documents} documents, {self.bytes / seconds / 1e6:.1f} MB/s, "
            f"{self.tokens / seconds / 1e3:.0f}k tokens/s"
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(self._rates())
            self._bar.close()
