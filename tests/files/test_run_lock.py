"""A folder belongs to one run, until that ends however it may."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_satformer.files import run_lock
from megatron_satformer.files.run_lock import claim
from tests.small import SHAPE

ROOT = Path(__file__).resolve().parents[2]
# Its child lives on, as loaders of data do for a while, with whatever it has inherited.
RUN = """
import os, sys, time
from megatron_satformer.files.run_lock import claim
from tests.small import SHAPE
claim(sys.argv[1])
if os.fork():
    sys.stdin.read()
else:
    print(os.getpid(), flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    first = subprocess.Popen(
        [sys.executable, "-c", RUN, tmp_path],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(first.stdout.readline())
    try:
        told = rf"save \({tmp_path}\) must be this run's alone.*: process {first.pid} on "
        with pytest.raises(ValueError, match=told):
            claim(str(tmp_path))
        first.kill()
        first.wait()
        os.kill(child, 0)
        claim(str(tmp_path))  # at once
    finally:
        os.kill(child, signal.SIGKILL)
        first.stdin.close()
        first.stdout.close()


def test_a_requeued_job_waits_for_the_run_before_it(tmp_path, monkeypatch, capsys):
    answers = [False, False, True]
    monkeypatch.setattr(run_lock, "try_lock", lambda descriptor: answers.pop(0))
    monkeypatch.setattr(run_lock, "PATIENCE", 0)
    monkeypatch.setattr(run_lock, "POLL", 0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    claim(str(tmp_path))
    assert capsys.readouterr().out.count(f"waiting up to 300 s for {tmp_path}, held by ") == 1
    assert " of job 77, since " in (tmp_path / run_lock.LOCK).read_text()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_lock, "try_lock", lambda descriptor: None)
    claim(str(tmp_path / "new"))
    assert "is on a file system without locks" in capsys.readouterr().out
    claim(None)
    claim("s3://bucket/run")
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_training_is_refused_where_another_run_saves(pretrain, data_flags, tmp_path):
    claim(str(tmp_path))  # until the end of the tests
    flags = [*SHAPE, *data_flags, "--train-iters", 2, "--save", tmp_path, "--save-interval", 1]
    run = pretrain(1, *flags, code=2)
    told = f"error: save ({tmp_path}) must be this run's alone, and another saves there: process "
    assert run.output.count(f"{told}{os.getpid()} on ") == 1
    assert os.listdir(tmp_path) == [run_lock.LOCK]
