"""The job scripts under a SLURM of this machine alone."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_satformer.data.tokenizers.training import train_tokenizer
from tests.debian import why_not
from tests.examples.slurm_cluster import Cluster, wait_for
from tests.texts import source_texts, write_lines

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = "examples/slurm/pretrain.sbatch"
STEPS, HELD_AT = 40, (6, 14)
SLOW = 400  # seconds that a step of the way may take on a loaded machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = None
    try:
        cluster = Cluster(root)
        yield cluster
    except OSError as error:
        pytest.skip(str(error))
    finally:
        if cluster is not None:
            cluster.stop()
        shutil.rmtree(root, ignore_errors=True)


def submit(cluster: Cluster, log: Path, *words: object, **environment: object) -> str:
    """Submits to a node without GPUs, from the repository's root."""
    here = {
        "PATH": f"{Path(sys.executable).parent}:{cluster.environment['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    options = ["--gpus-per-node=0", "--cpus-per-task=1", "--oversubscribe", "--output", log]
    given = here | {name: str(value) for name, value in environment.items()}
    return cluster.submit(ROOT, *options, *words, **given)


def await_end(cluster: Cluster, job: str, log: Path) -> None:
    """Waits until a job is over; it must have succeeded."""

    def state() -> str:
        found = cluster.fields(job).get("JobState", "")
        return "" if found in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED") else found

    assert wait_for(state, f"the end of {log.name}", SLOW) == "COMPLETED", log.read_text()


# Stands for a training script: a launcher as job scripts look for it, with a worker that SIGTERM
# ends; the second start is done at once, the first when it is told so.
TASK = """
touch "$PROBE/started.$SLURM_ARRAY_TASK_ID.${SLURM_RESTART_COUNT:-0}"
[[ ${SLURM_RESTART_COUNT:-0} == 0 ]] || exit 0
exec python3 - --rdzv-id $SLURM_JOB_ID.$SLURM_STEP_ID rendezvous <<'END'
import os, subprocess, sys
wait = "until [[ -e $PROBE/go ]]; do sleep 0.2; done"
sys.exit(subprocess.run(["bash", "-c", wait]).returncode)
END
"""


def test_a_task_of_an_array_queues_itself_alone_again(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "task.sh"
    script.write_text(TASK)
    paths = {"PROBE": tmp_path, "CHECKPOINT_PATH": tmp_path / "run_%a"}
    words = ["--nodes=1", "--array=0-1", PRETRAIN, script]
    job = submit(cluster, tmp_path / "log_%a", *words, **paths)
    started = [tmp_path / f"started.{task}.0" for task in (0, 1)]
    wait_for(lambda: all(path.exists() for path in started), "both tasks")
    # the last task has the number of the whole array
    fields = cluster.fields(f"{job}_1")
    assert fields["JobId"] == job
    cluster.ask("scancel", "--signal=USR2", "--batch", f"{job}_1")
    wait_for((tmp_path / "started.1.1").exists, "the second start")
    assert cluster.fields(f"{job}_0")["Restarts"] == "0"
    assert not (tmp_path / "started.0.1").exists()
    (tmp_path / "go").touch()
    for task in (0, 1):
        await_end(cluster, f"{job}_{task}", tmp_path / f"log_{task}")
    assert cluster.fields(f"{job}_1")["Restarts"] == "1"
    assert (tmp_path / "run_0/starts").is_dir()
    assert (tmp_path / "run_1/starts").is_dir()


def rank_of(job: str) -> psutil.Process:
    """The one rank of a job: torchrun's child; what loads data for it is a child of its own."""
    found = psutil.process_iter(["environ", "cmdline", "ppid"])
    ranks = {
        process.pid: process
        for process in found
        if (process.info["environ"] or {}).get("SLURM_JOB_ID") == job
        and "RANK" in process.info["environ"]
        and any(word.endswith("pretrain_satformer.py") for word in process.info["cmdline"] or ())
    }
    (rank,) = (process for process in ranks.values() if process.info["ppid"] not in ranks)
    return rank


def is_told_to_end(process: psutil.Process) -> bool:
    """Whether SIGTERM waits for a process that is stopped."""
    pending = [
        int(line.split()[1], 16)
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
        if line.startswith(("SigPnd:", "ShdPnd:"))
    ]
    return any(mask >> (signal.SIGTERM - 1) & 1 for mask in pending)


def read_steps(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if record["split"] == "train"]


def hit_the_time_limit(cluster: Cluster, job: str, folder: Path, step: int) -> None:
    """Lets a job train to a step at least, and no further until its time is up for SLURM.

    How long that takes is the machine's affair: the limit is set once the step is done.
    """
    wait_for(lambda: any(one["step"] >= step for one in read_steps(folder)), f"step {step}", SLOW)
    restarts = int(cluster.fields(job)["Restarts"])
    worker = rank_of(job)
    worker.send_signal(signal.SIGSTOP)
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    wait_for(lambda: is_told_to_end(worker), "the time limit", SLOW)
    worker.send_signal(signal.SIGCONT)
    wait_for(lambda: int(cluster.fields(job)["Restarts"]) > restarts, "the next start", SLOW)
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=60")


def test_from_text_to_evaluation(cluster: Cluster, tmp_path: Path) -> None:
    """Prepared by an array, stopped twice by the time limit, evaluated once it is done."""
    texts = [part for text in source_texts() for part in text.split("\n\n\n") if part]
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"text": text} for text in texts])
    tokenizer = train_tokenizer([corpus], tmp_path / "tokenizer", 500).model
    flags = ["--input", corpus, "--output-prefix", tmp_path / "corpus", "--append-eod"]
    flags += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer]
    parts = submit(
        cluster,
        tmp_path / "log_part_%a",
        *("--array=0-0", "examples/slurm/preprocess.sbatch", *flags),
    )
    command = f"python3 tools/merge_datasets.py --input {tmp_path}/corpus.parts"
    command += f" --output-prefix {tmp_path}/corpus_text_document"
    merged = submit(
        cluster, tmp_path / "log_merge", f"--dependency=afterok:{parts}", "--wrap", command
    )

    paths = {"DATA_PATH": tmp_path / "corpus_text_document", "TOKENIZER_MODEL": tokenizer}
    paths |= {"SPLIT": "90,10,0"}
    flags = ["--model-size", "debug", "--global-batch-size", 2, "--train-tokens", 512 * STEPS]
    flags += ["--eval-iters", 0, "--log-interval", 1, "--data-cache-path", tmp_path / "cache"]
    train = ["--nodes=1", PRETRAIN, "examples/pretrain/launch.sh", *flags]
    # Two launches at the same time on one machine; one of them hits its limit twice.
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    after = f"--dependency=afterok:{merged}"
    options = ["--job-name=whole", "--time=60", after]
    whole_job = submit(
        cluster, tmp_path / "log_whole", *options, *train, **paths, CHECKPOINT_PATH=whole
    )
    log = tmp_path / "log_stopped"
    options = ["--job-name=stopped", "--time=60", "--signal=B:USR2@1", after]
    job = submit(cluster, log, *options, *train, **paths, CHECKPOINT_PATH=stopped)
    tasks = tmp_path / "tasks"
    subprocess.run(
        [sys.executable, ROOT / "tools/build_eval_tasks.py", "--input", corpus, "--save", tasks]
        + ["--split", "90,10,0", "--samples", "2"],
        check=True,
        capture_output=True,
    )
    evaluated = submit(
        cluster,
        tmp_path / "log_evaluated",
        *(f"--dependency=afterok:{job}", "examples/slurm/evaluate.sbatch"),
        "examples/evaluate/3_offline.sh",
        CHECKPOINT_PATH=stopped,
        TASKS=tasks,
    )
    await_end(cluster, f"{parts}_0", tmp_path / "log_part_0")
    await_end(cluster, merged, tmp_path / "log_merge")
    for step in HELD_AT:
        hit_the_time_limit(cluster, job, stopped, step)
        assert cluster.fields(evaluated)["JobState"] == "PENDING"
    await_end(cluster, whole_job, tmp_path / "log_whole")
    await_end(cluster, job, log)

    one, other = read_steps(whole), read_steps(stopped)
    assert [record["step"] for record in one] == [*range(1, STEPS + 1)]
    assert [(r["step"], r["lm_loss"]) for r in other] == [(r["step"], r["lm_loss"]) for r in one]
    told = log.read_text()
    assert told.count("the time limit is near, stopping") == told.count(f"queueing job {job} again")
    starts = sorted((stopped / "starts").iterdir())
    assert len(starts) == int(cluster.fields(job)["Restarts"]) + 1 == 3
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    for start in starts:
        assert head.stdout in (start / "git.txt").read_text()
        assert f"CHECKPOINT_PATH={stopped}" in (start / "environment.txt").read_text()
        assert shlex.split((start / "command.txt").read_text())[-2:] == flags_end(flags)
    assert "train_samples" in (starts[-1] / "arguments.txt").read_text()

    await_end(cluster, evaluated, tmp_path / "log_evaluated")
    (results,) = (stopped / "results").glob("results_*.json")
    assert json.loads(results.read_text())["results"]["local_perplexity"]


def flags_end(flags: list[object]) -> list[str]:
    return [*map(str, flags[-2:])]
