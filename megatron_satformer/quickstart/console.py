"""What the user sees: headers, lines, one live line on a terminal, a table at the end."""

import shutil
import sys
import time
from typing import TextIO

INDENT = 6


class Console:
    """Prints to a terminal or to a log; only a terminal gets the live line."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.is_terminal = self.stream.isatty()
        self._start = time.perf_counter()
        self._live = False

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def header(self, number: int, total: int, name: str, what: str) -> None:
        """Announces a step."""
        self._write(f"[{number}/{total}] {name:<11}{what}")

    def line(self, text: str = "", indent: int = INDENT) -> None:
        """Prints a line that stays."""
        self._write(f"{' ' * indent}{text}".rstrip())

    def live(self, text: str) -> None:
        """Shows what is going on now, in place of the last live text; nothing in a log."""
        if not self.is_terminal:
            return
        width = shutil.get_terminal_size().columns - 1
        self.stream.write(f"\r\x1b[K{(' ' * INDENT + text)[:width]}")
        self.stream.flush()
        self._live = True

    def _write(self, text: str) -> None:
        if self._live:
            self.stream.write("\r\x1b[K")
            self._live = False
        self.stream.write(text + "\n")
        self.stream.flush()


def format_seconds(seconds: float) -> str:
    """Returns "8.3 s" or "4 min 07 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def format_size(size: int) -> str:
    """Returns "812 B", "4.0 kB" or "75.3 MB"."""
    if size < 1000:
        return f"{size} B"
    return f"{size / 1e3:.1f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"


def format_table(rows: list[tuple[str, ...]]) -> list[str]:
    """Returns the rows as lines with aligned columns; the first row is the heading."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in (lines[0], "  ".join("-" * w for w in widths), *lines[1:])]
