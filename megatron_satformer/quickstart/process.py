"""Child processes that end with us, whatever happens, and write to a log that we read along.

A child carries the run's folder in its environment, and so do its own children: that is how those
of a killed run are found, even though torchrun puts each rank in a session of its own.
"""

import contextlib
import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[2]
MARK = ".quickstart"  # holds the lock and the stamps; a folder with it was made by us
VARIABLE = "SATFORMER_QUICKSTART"
PATIENCE = 5.0  # seconds between asking a process to end and ending it
PR_SET_PDEATHSIG, LIBC = 1, ctypes.CDLL(None)
EXCERPT_LINES = 12
# An error that ended a Python process, but not torchrun's, which only says that a rank failed.
ERROR = re.compile(
    r"^(?:\[rank\d+\]:)?\s*(?!.*(?:ChildFailedError|SignalException))"
    r"((?:[\w.]+(?:Error|Exception|Exit))\b.*|(?:\S+: )?error: .*)$"
)
# What ended a rank, as torchrun tells it, which itself sends SIGTERM (15) to those that are left.
RANK_SIGNAL = re.compile(r"[Ss]ignal (?!15)(\d+) \(SIG\w+\) received")


class StepError(Exception):
    """A step that failed, and why; the lines of its log that show it may follow."""


def run_python(
    words: Sequence[str],
    log: Path,
    root: Path,
    take: Callable[[str], str] = str.strip,
    environment: dict[str, str] | None = None,
) -> str:
    """Runs Python in the repository and returns the last line of its output.

    The child itself appends the output to `log`, so that no line is lost if we are killed. `take`
    gets each line and returns what a terminal shall show, "" for what it shows already.

    Raises:
        StepError: If it ends with another exit code than 0.
    """
    # transformers copies an exported folder's code to this cache before it imports it
    offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{root}/{MARK}/hf_modules"}
    command = [sys.executable, *words]
    log.parent.mkdir(exist_ok=True)
    told: list[str] = []
    code, rest, shown = None, "", "starting"
    with (
        log.open("a") as output,
        log.open(errors="replace") as reader,
        tqdm(bar_format="      {elapsed}   {desc}", leave=False, disable=None) as bar,
    ):
        print(f"$ {shlex.join(command)}", file=output, flush=True)
        reader.seek(0, os.SEEK_END)
        child = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | offline | {VARIABLE: str(root)} | (environment or {}),
            start_new_session=True,  # ctrl-C comes to us alone, and we end it in order
            preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),  # if we are killed
        )
        try:
            while code is None:
                time.sleep(0.1)
                code = child.poll()  # before reading: nothing is written after it
                *lines, rest = (rest + reader.read() + "\n" * (code is not None)).split("\n")
                for line in filter(str.strip, lines):
                    told.append(line)
                    shown = take(line) or shown
                bar.set_description_str(shown[: shutil.get_terminal_size().columns - 20])
        finally:
            end_processes(root)
    if code:
        raise StepError(f"{explain_failure(code, told)}\nAll of it: {log}")
    return told[-1].strip() if told else ""


def end_processes(root: Path) -> None:
    """Ends every process that a quickstart in this folder started."""
    found = psutil.process_iter(["environ"])  # None where it may not be read
    ours = [p for p in found if (p.info["environ"] or {}).get(VARIABLE) == str(root)]
    ours = [process for process in ours if process.pid != os.getpid()]
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in ours:
            with contextlib.suppress(psutil.Error):
                end(process)
        _, ours = psutil.wait_procs(ours, PATIENCE)


def explain_failure(code: int, lines: Sequence[str]) -> str:
    """Says why a command ended with this code, with the lines of its output that show it."""
    reason, end = f"its command ended with exit code {code}.", len(lines)
    signals = [int(found[1]) for line in lines if (found := RANK_SIGNAL.search(line))]
    # When one rank fails, the others fail after it for want of it: the first one is the cause.
    errors = [(n, found[1]) for n, line in enumerate(lines, 1) if (found := ERROR.match(line))]
    if code < 0 or signals:
        name = signal.Signals(-code if code < 0 else signals[0]).name
        memory = ", perhaps because memory ran out" if name == "SIGKILL" else ""
        reason = f"its command was ended by {name}{memory}."
    elif errors:
        end, reason = errors[0]
    shown = lines[max(0, end - EXCERPT_LINES) : end]
    return "\n".join([reason.strip(), *(f"    | {line.rstrip()}" for line in shown)])
