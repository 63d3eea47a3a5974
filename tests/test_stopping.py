"""What happens to one process of a launch through torchrun ends the launch, and loses nothing."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_satformer.checkpoint.megatron.reader import TRACKER
from megatron_satformer.files.metrics_file import read_metrics
from tests.small import PP2, SHAPE

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2".split()
PATIENCE = 600  # seconds, for what takes a few


def wait_for(happened):
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.05)


class Launch:
    """Two ranks that train under torchrun until they are stopped."""

    def __init__(self, log, flags, options=()):
        self.log = log
        command = [sys.executable, *LAUNCH, *options, "pretrain_satformer.py", *map(str, flags)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with log.open("w") as output:
            self.torchrun = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=output, env=environment
            )
        wait_for(lambda: self.torchrun.poll() is not None or "saved checkpoint" in self.output)
        assert self.torchrun.poll() is None, self.output[-5000:]
        children = psutil.Process(self.torchrun.pid).children()
        self.ranks = {int(child.environ()["RANK"]): child for child in children}

    @property
    def output(self):
        return self.log.read_text(errors="replace")

    def end(self):
        """Its exit code, once it and its ranks are gone; and how long that took."""
        start = time.monotonic()
        self.torchrun.wait(PATIENCE)
        took = time.monotonic() - start
        wait_for(lambda: not any(rank.is_running() for rank in self.ranks.values()))
        return self.torchrun.returncode, took


@pytest.fixture
def launch(tmp_path):
    launches = []

    def start(*args):
        launches.append(Launch(tmp_path / f"log{len(launches)}", *args))
        return launches[-1]

    yield start
    for begun in launches:
        for process in (begun.torchrun, *begun.ranks.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.slow
def test_a_launch_that_is_struck_goes_on_where_it_was(pretrain, launch, data_flags, tmp_path):
    folder = tmp_path / "run"
    flags = [*SHAPE, *data_flags, *PP2.split(), "--train-iters", 5000, "--save-interval", 5]
    flags += ["--keep-last", 2, "--exit-signal-handler"]
    places = ["--save", folder, "--load", folder]

    struck = launch([*flags, *places])
    struck.ranks[1].kill()
    code, took = struck.end()
    assert code == 1
    assert took < 60
    assert "Signal 9 (SIGKILL) received by PID" in struck.output
    saved = int((folder / TRACKER).read_text())
    assert saved % 5 == 0

    # torchrun hands SIGUSR2 on where it is told to, and then ends with 1 itself.
    options = ["--signals-to-handle", "SIGTERM,SIGUSR2", "--shutdown-timeout", "200"]
    told = launch([*flags, *places], options)
    assert f"at iteration {saved}" in " ".join(told.output.split())
    told.torchrun.send_signal(signal.SIGUSR2)
    assert told.end()[0] == 1
    assert ": SIGUSR2; saves to" in told.output
    assert f"> stops after step {(folder / TRACKER).read_text()}: " in told.output

    # Else it dies of it, and its ranks follow.
    lost = launch([*flags, *places])
    lost.torchrun.send_signal(signal.SIGUSR2)
    assert lost.end()[0] == -signal.SIGUSR2
    assert ": SIGTERM; saves to" in lost.output
    reached = int((folder / TRACKER).read_text())
    assert f"> stops after step {reached}: " in lost.output

    straight = tmp_path / "straight"
    pretrain(2, *flags, "--save", straight, "--exit-interval", reached, board=False)
    records, expected = (read_metrics(f / "metrics.jsonl") for f in (folder, straight))
    assert [record["step"] for record in records] == list(range(1, reached + 1))
    assert [record["lm_loss"] for record in records] == [each["lm_loss"] for each in expected]
