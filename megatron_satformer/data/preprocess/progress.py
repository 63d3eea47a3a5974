"""Progress of tokenizing: a bar on a terminal, a line now and then in a log, JSON for machines."""

import json
import sys
import time
from typing import IO, Any

from megatron_satformer.data.datasets.byte_progress import byte_progress
from megatron_satformer.data.preprocess.encoding import Encoded
from megatron_satformer.data.preprocess.options import PreprocessOptions
from megatron_satformer.data.reading.chunks import Chunk

# Seconds between two reports, however small the log interval: fast runs would write nothing else.
INTERVAL = 1.0


class Progress:
    """Reports documents, MB/s, tokens/s and the time left on stderr.

    Args:
        options: Of the run: how often to report (at least a second apart), and the JSON log.
        total_bytes: Size of the input on disk; 0 if unknown.
        done_bytes: Bytes on disk that a run before this one has done.
    """

    def __init__(self, options: PreprocessOptions, total_bytes: int, done_bytes: int) -> None:
        self.log_interval, json_log = options.log_interval, options.json_log
        self.documents = self.bytes = self.tokens = self.file_bytes = 0
        self._left = total_bytes - done_bytes
        self._known = total_bytes > 0
        self._start = self._last = time.perf_counter()
        self._next = self.log_interval
        self._log: IO[str] | None = None
        if json_log is not None:
            try:
                self._log = open(json_log, "a", encoding="utf-8")  # noqa: SIM115 - closed on exit
            except OSError as error:
                raise ValueError(
                    f"json_log ({json_log}) cannot be written: {error.strerror}. Choose another."
                ) from None
        self._bar = None
        if sys.stderr.isatty():
            self._bar = byte_progress("tokenizing", total_bytes or None, done_bytes)

    def advance(self, chunk: Chunk, encoded: Encoded) -> None:
        """Counts a finished chunk."""
        self.documents += encoded.documents
        self.bytes += encoded.text_bytes
        self.tokens += sum(part.ids.size for part in encoded.keys)
        self.file_bytes += chunk.file_bytes
        if self._bar is not None:
            self._bar.update(chunk.file_bytes)
        now = time.perf_counter()
        if self.documents >= self._next and now - self._last >= INTERVAL:
            self._last = now
            self._next = self.documents - self.documents % self.log_interval + self.log_interval
            if self._bar is not None:
                self._bar.set_postfix_str(self._rates(), refresh=False)
            else:
                eta = self._eta()
                left = "" if eta is None else f", {eta:.0f} s left"
                print(f"Processed {self._rates()}{left}", file=sys.stderr, flush=True)
            self.log("progress")

    def log(self, event: str, **more: Any) -> None:
        """Writes a line to the JSON log, if there is one."""
        if self._log is None:
            return
        seconds = self._seconds()
        record = {
            "event": event,
            "time": time.time(),
            "seconds": round(seconds, 3),
            "documents": self.documents,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "mb_per_s": round(self.bytes / seconds / 1e6, 3),
            "tokens_per_s": round(self.tokens / seconds, 1),
            "eta_s": self._eta(),
            **more,
        }
        self._log.write(json.dumps(record) + "\n")
        self._log.flush()

    def _seconds(self) -> float:
        return max(time.perf_counter() - self._start, 1e-9)

    def _eta(self) -> float | None:
        if not self._known or not self.file_bytes:
            return None
        return round(self._seconds() * (self._left - self.file_bytes) / self.file_bytes, 1)

    def _rates(self) -> str:
        seconds = self._seconds()
        return (
            f"{self.documents} documents, {self.bytes / seconds / 1e6:.1f} MB/s, "
            f"{self.tokens / seconds / 1e3:.0f}k tokens/s"
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if error is not None:
            self.log("stopped", error=str(error))
        if self._bar is not None:
            self._bar.set_postfix_str(self._rates())
            self._bar.close()
        if self._log is not None:
            self._log.close()
