import contextlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_satformer.quickstart.process import (
    EXCERPT_LINES,
    StepError,
    end_processes,
    explain_failure,
    run_python,
)
from megatron_satformer.quickstart.run import Run, Step

ROOT = Path(__file__).resolve().parents[2]
# A child in a session of its own, like a rank of torchrun, under a child.
FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"],
                         start_new_session=True)
print("started", child.pid, flush=True)
time.sleep(60)
"""
PARENT = """
import sys
from pathlib import Path
from megatron_satformer.cli import run_tool
from megatron_satformer.quickstart.run import Run, Step

step = Step("corpus", "sleeps", {"corpus": ""}, sys.argv[2])
run_tool(lambda: Run(Path(sys.argv[1]), [step]).go())
"""


def read(path):
    return path.read_text() if path.is_file() else ""


@pytest.fixture
def family(tmp_path):
    """A quickstart whose step has two processes running, and those two."""
    root = tmp_path / "run"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(root), f"-c '{FAMILY}'"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 30
    while (match := re.search(r"^started (\d+)$", read(root / "logs/corpus.log"), re.M)) is None:
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
    assert "Interrupted in step 1 of 1 (corpus). To go on: run again" in told
    assert not any(child.is_running() for child in children)


def test_after_a_kill_the_next_run_ends_the_children(family):
    root, parent, (child, grandchild) = family
    parent.kill()
    parent.wait()
    child.wait(10)  # told by the kernel, so that torchrun can end its ranks
    assert grandchild.is_running()
    Run(root, [Step("corpus", "", {"corpus": ""}, "")])
    psutil.wait_procs([grandchild], timeout=10)
    assert not grandchild.is_running()


def test_processes_of_other_runs_are_left_alone(family, tmp_path):
    _, _, children = family
    end_processes(tmp_path / "other")
    assert all(child.is_running() for child in children)


def test_every_line_is_handed_on_once(tmp_path):
    program = (
        "import sys\nfor n in range(2000): print(n)\n"
        "sys.stderr.write('bar\\rbaz\\n')\nprint('x', end='')"
    )
    log, lines = tmp_path / "logs" / "log", []
    log.parent.mkdir()
    log.write_text("from before\n")
    take = lambda line: lines.append(line) or ""  # noqa: E731
    assert run_python(["-u", "-c", program], log, tmp_path, take) == "x"
    assert lines == [*map(str, range(2000)), "bar", "baz", "x"]
    assert re.match(r"from before\n\$ .*\n0\n", log.read_text(), re.DOTALL)


def test_the_environment_of_a_child(tmp_path):
    program = "import os; print(os.environ['HF_HUB_OFFLINE'], os.environ['MINE'])"
    assert run_python(["-c", program], tmp_path / "log", tmp_path, str, {"MINE": "2"}) == "1 2"


def test_a_failure_names_the_log(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(StepError) as failed:
        run_python(["-c", "print('a'); exit(3)"], log, tmp_path)
    assert str(failed.value) == (f"its command ended with exit code 3.\n    | a\nAll of it: {log}")


TORCHRUN = """W1122 api.py:1028] Sending process 24670 closing signal SIGTERM
E1122 api.py:1002] failed (exitcode: {code}) local_rank: 1 (pid: 24671) of binary: python3.12
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
  exitcode  : {code} (pid: 24670)
  traceback : {trace}
"""


@pytest.mark.parametrize(
    ("log", "code", "reason"),
    [
        (
            "[rank1]: Traceback (most recent call last):\n[rank1]: TypeError: the first\n"
            "[rank0]: RuntimeError: gloo lost its peer\n" + TORCHRUN.format(code=1, trace="none"),
            1,
            "TypeError: the first",
        ),
        ("error: 3 pieces are too few.\n", 2, "error: 3 pieces are too few."),
        ("usage: x\nx.py: error: unknown flag --y\n", 2, "x.py: error: unknown flag --y"),
        ("quiet\n", 3, "its command ended with exit code 3."),
        (
            "[rank0]: RuntimeError: gloo lost its peer\n"
            + TORCHRUN.format(code=-15, trace="Signal 15 (SIGTERM) received by PID 24670")
            + TORCHRUN.format(code=-9, trace="Signal 9 (SIGKILL) received by PID 24671"),
            1,
            "its command was ended by SIGKILL, perhaps because memory ran out.",
        ),
        ("", -11, "its command was ended by SIGSEGV."),
    ],
)
def test_the_reason_is_found(log, code, reason):
    assert explain_failure(code, log.splitlines()).split("\n")[0] == reason


def test_the_excerpt_ends_with_the_cause():
    lines = [*(f"line {n}" for n in range(50)), "OSError: full", "and", "more"]
    reason, *excerpt = explain_failure(1, lines).split("\n")
    assert reason == "OSError: full"
    assert len(excerpt) == EXCERPT_LINES
    assert excerpt[-2:] == ["    | line 49", "    | OSError: full"]
