import contextlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_satformer.quickstart import process
from megatron_satformer.quickstart.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]


# A child in a session of its own, like a rank of torchrun, under a child.
FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"],
                         start_new_session=True)
print("started", child.pid, flush=True)
time.sleep(60)
"""
PARENT = f"""
import sys
from pathlib import Path
from megatron_satformer.cli import run_tool
from megatron_satformer.quickstart.console import Console
from megatron_satformer.quickstart.folder import RunFolder
from megatron_satformer.quickstart.runner import Result, Step, run_steps

def work(job):
    job.run([sys.executable, "-c", {FAMILY!r}])

def main():
    step = Step("corpus", "sleeps", ("corpus",), work)
    sys.exit(run_steps([step], RunFolder(sys.argv[1]), Console()))

run_tool(main)
"""


def read(path):
    return path.read_text() if path.is_file() else ""


@pytest.fixture
def family(tmp_path):
    """A quickstart whose step has two processes running, and those two."""
    root = tmp_path / "run"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(root)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = root / "logs" / "corpus.log"
    end = time.monotonic() + 30
    while (match := re.search(r"^started (\d+)$", read(log), re.MULTILINE)) is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    grandchild = psutil.Process(int(match[1]))
    yield root, parent, [grandchild.parent(), grandchild]
    for each in (parent, grandchild):
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            each.kill()
    parent.wait()
    parent.stdout.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_the_children(family, number, code):
    _, parent, children = family
    parent.send_signal(number)
    told = parent.communicate(timeout=20)[0]
    assert parent.returncode == code
    assert "Interrupted in step 1 of 1 (corpus). Run the same again to go on" in told
    assert not any(child.is_running() for child in children)


def test_after_a_kill_the_next_run_ends_the_children(family):
    root, parent, (child, grandchild) = family
    parent.kill()
    parent.wait()
    if sys.platform == "linux":
        child.wait(10)  # told by the kernel, so that torchrun can end its ranks
    assert grandchild.is_running()
    RunFolder(root)
    psutil.wait_procs([grandchild], timeout=10)
    assert not grandchild.is_running()


def test_other_runs_processes_are_left_alone(family, tmp_path):
    _, _, children = family
    assert process.end_processes(tmp_path / "other") == 0
    assert all(child.is_running() for child in children)


def test_every_line_is_handed_on_once(tmp_path):
    code = (
        "import sys\nfor n in range(2000): print(n)\n"
        "sys.stderr.write('bar\\rbaz\\n')\nprint('x', end='')"
    )
    log, lines = tmp_path / "log", []
    log.write_text("from before\n")
    done = process.run_logged(
        [sys.executable, "-u", "-c", code], log, tmp_path, tmp_path, {}, lines.append, lambda: None
    )
    assert done == 0
    assert lines == [*map(str, range(2000)), "bar", "baz", "x"]
    assert log.read_text().startswith("from before\n0\n")
