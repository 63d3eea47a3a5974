"""The comparison as one command: trials, kill, resume, report."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_satformer.comparison.run import CompareOptions, find_slots
from megatron_satformer.config import DecoderOptions
from megatron_satformer.model.architectures import PLAIN

COMPARED = [PLAIN, DecoderOptions.architecture]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"size": "huge"}, r"size \(huge\) must be one of tiny, debug, "),
        ({"seeds": 0}, r"seeds \(0\) must be at least 1"),
        ({"steps": 1}, r"steps \(1\) must be at least 4"),
        ({"lr_factors": (0.0,)}, r"lr_factors \(\(0.0,\)\) must be above 0"),
        ({"budget_minutes": 0.0}, r"budget_minutes \(0.0\) must be above 0"),
    ],
)
def test_options_out_of_range(options, told):
    with pytest.raises(ValueError, match=told):
        CompareOptions(**options)


def test_cores_are_shared_by_the_trials(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [slot["OMP_NUM_THREADS"] for slot in find_slots(ranks=1, jobs=None)] == ["1"] * 8
    assert [slot["OMP_NUM_THREADS"] for slot in find_slots(ranks=1, jobs=2)] == ["4"] * 2
    assert [slot["OMP_NUM_THREADS"] for slot in find_slots(ranks=2, jobs=None)] == ["1"] * 4


@pytest.mark.slow
def test_smoke_with_a_kill_in_the_middle(tmp_path):
    """examples/compare/run.sh --smoke; killed behind a trial, it does not run that again."""
    command = [str(ROOT / "examples/compare/run.sh"), "--smoke"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"SAVE": str(tmp_path / "run"), "PATH": path}
    first = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert first.stdout is not None
    shown = []
    for line in first.stdout:
        shown.append(line)
        if "[1/" in line:
            break
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("done.json")}
    assert done, shown
    time.sleep(0.1)
    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-3000:]
    assert {file: file.stat().st_mtime_ns for file in done} == done
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for task in ("text", "mqar"):
        for variant in COMPARED:
            runs = results["tasks"][task][variant]["seeds"].values()
            assert len(runs) == 2
            assert len({run["loss"] for run in runs}) == 2
            assert ("accuracy" in next(iter(runs))) == (task == "mqar")
    assert [row["architecture"] for row in results["cost"]["measured"]] == COMPARED
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 7
    assert "http" not in page
    assert "too few seeds" in page
    assert "Dead KV heads" in page
    dead = results["tasks"]["text"][DecoderOptions.architecture]["seeds"]["1"]["dead"]
    assert [step for step, _ in dead] == [*range(1, 17)]
    short = "--archs transformer --seeds 1 --retrieval-tasks --budget-minutes 0.01".split()
    probing = subprocess.run([command[0], *short], env=environment, capture_output=True, text=True)
    assert probing.returncode == 2, probing.stderr[-3000:]
    assert "error: budget_minutes (0.01) must be at least " in probing.stderr
