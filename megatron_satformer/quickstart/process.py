"""Child processes that end with us, whatever happens, and write to a log that we read along.

A child carries the run's folder in its environment, and so do its own children: that is how those
of an interrupted or killed run are found, even though torchrun puts each rank in a session of its
own.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import psutil

VARIABLE = "SATFORMER_QUICKSTART"
PATIENCE = 5.0  # seconds between asking a process to end and ending it
POLL = 0.1
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def run_logged(
    command: Sequence[str],
    log: Path,
    root: Path,
    directory: Path,
    environment: dict[str, str],
    on_line: Callable[[str], None],
    on_wait: Callable[[], None],
) -> int:
    """Runs a command to its end, its output appended to `log` and handed on line by line.

    The child writes to the file itself, so that no line is lost if we are killed.

    Args:
        command: Program and arguments.
        log: File that gets stdout and stderr.
        root: Folder of the run, which marks the child as ours.
        directory: Where it runs.
        environment: Variables on top of ours.
        on_line: Called with each finished line.
        on_wait: Called about ten times a second while nothing comes.

    Returns:
        The exit code; negative is the signal that ended the child.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output, log.open("rb") as reader:
        reader.seek(0, os.SEEK_END)
        child = subprocess.Popen(
            list(command),
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, VARIABLE: os.fspath(root)},
            start_new_session=True,  # ctrl-C comes to us alone, and we end it in order
            preexec_fn=_end_with_parent,
        )
        try:
            rest = b""
            while (code := child.poll()) is None:
                rest = _hand_on(reader, rest, on_line)
                on_wait()
                time.sleep(POLL)
            rest = _hand_on(reader, rest, on_line)
            if rest:
                on_line(rest.decode("utf-8", "replace"))
        finally:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    child.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(PATIENCE)
            end_processes(root)
    return code


def _end_with_parent() -> None:
    # torchrun ends its ranks in order on SIGTERM.
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _hand_on(reader: IO[bytes], rest: bytes, on_line: Callable[[str], None]) -> bytes:
    *lines, rest = (rest + reader.read()).replace(b"\r", b"\n").split(b"\n")
    for line in lines:
        on_line(line.decode("utf-8", "replace"))
    return rest


def end_processes(root: Path) -> int:
    """Ends every process that a quickstart in this folder started, and returns how many."""
    ours = [process for process in psutil.process_iter() if _is_ours(process, root)]
    for process in ours:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(ours, timeout=PATIENCE)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=PATIENCE)
    return len(ours)


def _is_ours(process: psutil.Process, root: Path) -> bool:
    if process.pid == os.getpid():
        return False
    try:
        return process.environ().get(VARIABLE) == os.fspath(root)
    except (psutil.Error, OSError):
        return False  # ended already, or somebody else's
