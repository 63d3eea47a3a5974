"""What this process holds of the machine's memory."""

from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")


def resident(what: str) -> int:
    """VmRSS, or its peak VmHWM, of this process in bytes; getrusage's includes the parent's.

    Where there is no /proc the peak is not known, and VmHWM is what is held now.
    """
    if not STATUS.exists():
        return int(psutil.Process().memory_info().rss)
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{what}:"))
    return int(line.split()[1]) * 1024
