"""The job scripts, with this machine as the cluster: srun runs its command here."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.examples.commands import write_command

ROOT = Path(__file__).resolve().parents[2]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def environment(tmp_path):
    """Of a job of one node; scontrol writes down what is queued again."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    # as srun, whose options begin with two dashes
    srun = 'printf "%s\\n" "$@" >"$PROBE/srun"; while [[ $1 == --* ]]; do shift; done; exec "$@"'
    write_command(bin_dir / "srun", f"{srun}")
    write_command(
        bin_dir / "scontrol",
        'case $1 in show) echo localhost ;; requeue) echo "$2" >"$PROBE/requeued" ;; esac',
    )
    return os.environ | {
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "PROBE": str(tmp_path),
        "CHECKPOINT_PATH": str(tmp_path / "run"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": f"9{os.getpid()}",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
    }


def start(environment, *words, script="pretrain", **changes):
    """Starts a job script, as SLURM does."""
    return subprocess.Popen(
        ["bash", ROOT / f"examples/slurm/{script}.sbatch", *words],
        env=environment | changes,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(environment, *words, code=0, **changes):
    """Runs a job script to its end; returns what it said."""
    job = start(environment, *words, **changes)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == code, output
    return output


@pytest.fixture
def task(tmp_path):
    """A training script that writes down its flags and environment, and is done."""
    write_command(tmp_path / "task.sh", 'env >"$PROBE/env"; printf "%s\\n" "$@" >"$PROBE/flags"')
    return tmp_path / "task.sh"


def read_environment(folder):
    return dict(line.split("=", 1) for line in (folder / "env").read_text().splitlines())


def test_a_port_that_is_taken_is_left_to_whoever_has_it(environment, task, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        # the number of a job whose port this would be
        port = taken.getsockname()[1]
        jobs = {"SLURM_JOB_ID": "70123"}
        run(environment, task, **jobs)
        assert read_environment(tmp_path)["MASTER_PORT"] == "20123"
        with socket.socket() as other:
            other.bind(("", 20123))
            other.listen()
            run(environment, task, **jobs)
        assert read_environment(tmp_path)["MASTER_PORT"] == "20124"
        run(environment, task, **jobs, MASTER_PORT=str(port))
        assert read_environment(tmp_path)["MASTER_PORT"] == str(port)


def test_what_a_start_ran_with_is_kept_without_secrets(environment, task, tmp_path):
    secrets = {"WANDB_API_KEY": "s3cret", "HF_TOKEN": "s3cret", "DB_PASSWORD": "s3cret"}
    run(environment, task, "--lr", "1e-3", **secrets, TOKENIZER_MODEL="a b.model")
    (folder,) = (tmp_path / "run/starts").iterdir()
    assert folder.name == f"{environment['SLURM_JOB_ID']}.0"
    kept = {path.name: path.read_text() for path in folder.iterdir()}
    assert "s3cret" not in "".join(kept.values())
    assert "TOKENIZER_MODEL=a\\ b.model\n" in kept["environment.txt"]
    command = shlex.split(kept["command.txt"])
    assert command[-4:] == [str(task), "--exit-signal-handler", "--lr", "1e-3"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert head.stdout in kept["git.txt"]
    assert "localhost" in kept["job.txt"]


def test_of_an_array_each_task_is_a_run_of_its_own(environment, task, tmp_path):
    array = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}
    paths = {"CHECKPOINT_PATH": f"{tmp_path}/run_%a", "TENSORBOARD_LOGS_PATH": "board_%a"}
    run(environment, task, "--seed", "10%a", **array, **paths)
    assert (tmp_path / "run_3/starts/70_3.0").is_dir()
    assert read_environment(tmp_path)["TENSORBOARD_LOGS_PATH"] == "board_3"
    assert (tmp_path / "flags").read_text().split() == ["--exit-signal-handler", "--seed", "103"]


def test_containers(environment, task, tmp_path):
    mounts = {"CONTAINER_MOUNTS": "/data:/data"}
    run(environment, task, CONTAINER_IMAGE="nvcr.io#nvidia/pytorch", **mounts)
    words = (tmp_path / "srun").read_text().splitlines()
    assert words[:4] == [
        "--kill-on-bad-exit=1",
        "--container-image=nvcr.io#nvidia/pytorch",
        f"--container-workdir={ROOT}",
        f"--container-mounts={ROOT}:{ROOT},/data:/data",
    ]
    write_command(tmp_path / "bin/apptainer", 'until [[ $1 == *.sif ]]; do shift; done; "${@:2}"')
    run(environment, task, CONTAINER_IMAGE="/images/a.sif", **mounts)
    words = (tmp_path / "srun").read_text().splitlines()
    assert (
        words[1:8]
        == shlex.split(f"apptainer exec --nv --bind {ROOT},/data:/data --pwd {ROOT} /images/a.sif")[
            : len(words[1:8])
        ]
    )


@pytest.mark.parametrize(
    ("words", "changes", "told"),
    [
        ([], {}, "give the pretraining script to run"),
        (
            ["nowhere.sh"],
            {},
            f"the pretraining script (nowhere.sh) must be a file, as seen from {ROOT}",
        ),
        (["Makefile"], {"CHECKPOINT_PATH": ""}, "CHECKPOINT_PATH must be set"),
        (["--input", "x"], {"script": "preprocess"}, "submit it as an array"),
        (
            ["--input", "x"],
            {"script": "preprocess", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "7"}
            | {"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "7"}
            | {"SLURM_ARRAY_TASK_COUNT": "2"},
            "NUM_PARTS must be set where --array does not name all parts",
        ),
        ([], {"script": "evaluate"}, "give the evaluation script to run"),
    ],
)
def test_what_is_missing_is_told(environment, words, changes, told):
    assert told in run(environment, *words, code=2, **changes)


def test_a_scontrol_that_fails_is_told(environment, tmp_path):
    write_command(
        tmp_path / "bin/scontrol",
        'case $1 in show) echo localhost ;; *) echo "slurm: down" >&2; exit 1 ;; esac',
    )
    write_command(
        tmp_path / "task.sh", 'touch "$PROBE/ready0"; until [[ -e $PROBE/go ]]; do sleep 0.1; done'
    )
    job = start(environment, tmp_path / "task.sh")
    wait_for((tmp_path / "ready0").exists)
    job.send_signal(signal.SIGUSR2)
    (tmp_path / "go").touch()
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2, output
    assert "slurm: down" in output
    assert f"scontrol requeue {environment['SLURM_JOB_ID']} failed with exit code 1: " in output
    assert "submit it again" in output


WORKER = """
import os, pathlib, signal, time
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
here = pathlib.Path(os.environ["PROBE"])
ready = here / f"ready{os.environ['RANK']}"
ready.with_suffix(".new").write_text(str(os.getpid()))
ready.with_suffix(".new").rename(ready)
while not told:
    time.sleep(0.05)
(here / f"saved{os.environ['RANK']}").touch()
"""


@pytest.fixture
def workers(environment, tmp_path):
    """A job whose torchrun is as launch.sh starts it, around workers that need no Megatron."""
    (tmp_path / "worker.py").write_text(WORKER)
    write_command(
        tmp_path / "train.sh",
        f"exec {sys.executable} -m torch.distributed.run --nnodes $NNODES --nproc-per-node 2"
        " --rdzv-backend c10d --rdzv-endpoint localhost:0 --rdzv-id $SLURM_JOB_ID.0"
        ' "$PROBE/worker.py" "$@"',
    )
    job = start(environment, tmp_path / "train.sh")
    yield tmp_path, job
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGTERM)  # torchrun passes it on to its workers


@pytest.mark.slow
def test_the_time_limit_saves_and_requeues(workers):
    directory, job = workers
    wait_for(lambda: (directory / "ready0").exists() and (directory / "ready1").exists())
    job.send_signal(signal.SIGUSR2)  # as `--signal=B:USR2` does: to the batch shell alone
    output, _ = job.communicate(timeout=60)
    assert (directory / "saved0").exists()
    assert (directory / "saved1").exists()
    assert job.returncode == 0, output
    assert (directory / "requeued").read_text().startswith("9")


@pytest.mark.slow
def test_a_failure_is_not_requeued(workers):
    directory, job = workers
    wait_for(lambda: (directory / "ready0").exists())
    os.kill(int((directory / "ready0").read_text()), signal.SIGKILL)
    output, _ = job.communicate(timeout=60)
    assert job.returncode != 0, output
    assert not (directory / "requeued").exists()
