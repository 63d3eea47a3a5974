"""What the quickstart reuses, makes again and says; the whole of it is run by CI."""

import io
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from megatron_satformer.quickstart import steps
from megatron_satformer.quickstart.console import Console, format_seconds, format_size
from megatron_satformer.quickstart.failure import StepError
from megatron_satformer.quickstart.folder import KNOWN, RunFolder
from megatron_satformer.quickstart.main import MADE, run_quickstart
from megatron_satformer.quickstart.recipe import Recipe
from megatron_satformer.quickstart.runner import Job, Result, Step, run_steps

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(tmp_path):
    """Runs three steps that each copy the last one's file and add a line; returns what was done."""

    def start(fail="", word="one", output=tmp_path / "run", **options):
        done: list[str] = []

        def work(job, name, source, target, add):
            done.append(name)
            if name == fail:
                job.run([sys.executable, "-c", "print('before'); raise KeyError('the cause')"])
            text = (job.root / source).read_text() if source else ""
            (job.root / target).parent.mkdir(exist_ok=True)
            (job.root / target).write_text(f"{text}{add}\n")
            return Result(f"{name} made", {"lines": text.count("\n") + 1})

        plan = (
            ("corpus", "", "corpus/text", word),
            ("tokenizer", "corpus/text", "tokenizer/text", "two"),
            ("samples", "tokenizer/text", "samples.txt", "three"),
        )
        made = [
            Step(
                name,
                f"makes {name}",
                (target.split("/")[0],),
                partial(work, name=name, source=source, target=target, add=add),
                {"add": add},
            )
            for name, source, target, add in plan
        ]
        stream = io.StringIO()
        folder = RunFolder(output, **options)
        code = run_steps(made, folder, Console(stream))
        folder._lock_file.close()  # as the end of the process would
        return code, done, stream.getvalue()

    return start


ALL = ["corpus", "tokenizer", "samples"]


def test_makes_all_then_reuses_all(run, tmp_path):
    code, done, told = run()
    assert (code, done) == (0, ALL)
    assert (tmp_path / "run" / "samples.txt").read_text() == "one\ntwo\nthree\n"
    assert [f"[{n}/3] {name}" in told for n, name in enumerate(ALL, 1)] == [True] * 3
    code, done, told = run()
    assert (code, done) == (0, [])
    assert told.count("reused: ") == 3


@pytest.mark.parametrize(
    ("damage", "wrong"),
    [
        (lambda path: path.unlink(), "tokenizer/text is missing"),
        (lambda path: path.write_text("one\n"), "tokenizer/text has 4 bytes instead of 8"),
        (lambda path: path.write_text("one\ntwx\n"), "tokenizer/text was changed"),
    ],
)
def test_a_damaged_output_and_all_after_it_are_made_again(run, tmp_path, damage, wrong):
    run()
    damage(tmp_path / "run" / "tokenizer" / "text")
    code, done, told = run()
    assert (code, done) == (0, ["tokenizer", "samples"])
    assert f"made again: {wrong}" in told
    assert (tmp_path / "run" / "samples.txt").read_text() == "one\ntwo\nthree\n"
    assert run()[1] == []


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"key": 1}', "\x00"])
def test_an_unreadable_stamp_counts_as_none(run, tmp_path, content):
    run()
    (tmp_path / "run" / ".quickstart" / "samples.json").write_text(content)
    assert run()[1] == ["samples"]


def test_another_option_makes_again(run, tmp_path):
    run()
    _, done, told = run(word="uno")
    assert done == ALL
    assert "its options, or what it is made from, changed" in told
    assert (tmp_path / "run" / "samples.txt").read_text() == "uno\ntwo\nthree\n"


def test_a_failed_step_says_which_why_and_how_to_go_on(run, capsys):
    code, done, _ = run(fail="tokenizer")
    assert (code, done) == (1, ALL[:2])
    told = capsys.readouterr().err
    assert "Step 2 of 3 (tokenizer) failed after" in told
    assert "Why: KeyError: 'the cause'" in told
    assert "| before" in told
    assert "logs/tokenizer.log" in told
    assert "step 1 is kept" in told
    assert "--fresh" in told
    assert run()[1] == ALL[1:]


def test_a_failed_step_loses_what_came_after_it(run, tmp_path):
    run()
    (tmp_path / "run" / "tokenizer" / "text").unlink()
    assert run(fail="tokenizer")[0] == 1
    # the old samples still lie there, but nothing vouches for them
    assert run()[1] == ALL[1:]


def test_a_step_without_its_output_fails(tmp_path, capsys):
    step = Step("corpus", "makes nothing", ("corpus",), lambda job: Result("done"))
    assert run_steps([step], RunFolder(tmp_path / "run"), Console(io.StringIO())) == 1
    assert "made no corpus" in capsys.readouterr().err


def test_fresh_removes_only_what_is_ours(run, tmp_path):
    run()
    mine = tmp_path / "run" / "notes.txt"
    mine.write_text("mine")
    assert run(fresh=True)[1] == ALL
    assert mine.read_text() == "mine"


def test_fresh_does_not_follow_links(run, tmp_path):
    run()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("precious")
    os.rename(tmp_path / "run" / "tokenizer", tmp_path / "moved")
    (tmp_path / "run" / "tokenizer").symlink_to(elsewhere)
    run(fresh=True)
    assert (elsewhere / "precious").read_text() == "precious"


@pytest.mark.parametrize("fresh", [False, True])
def test_a_foreign_folder_is_refused_and_left_alone(tmp_path, fresh):
    (tmp_path / "corpus").mkdir()
    with pytest.raises(
        ValueError, match="must be a new or empty folder or one that the quickstart"
    ):
        RunFolder(tmp_path, fresh)
    assert sorted(os.listdir(tmp_path)) == ["corpus"]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder; it is a file"):
        RunFolder(tmp_path / "file")


def test_one_run_at_a_time(tmp_path):
    first = RunFolder(tmp_path / "run")
    with pytest.raises(
        ValueError, match=rf"in use by another quickstart \(process {os.getpid()}\)"
    ):
        RunFolder(tmp_path / "run", fresh=True)
    first._lock_file.close()
    RunFolder(tmp_path / "run")


def test_all_that_is_made_is_known():
    plan = steps.build_steps(Recipe())
    outputs = {name for step in plan for name in (*step.outputs, step.log_name.split("/")[0])}
    assert outputs == set(KNOWN)
    assert set(MADE) == set(KNOWN) - {"logs"}


@pytest.fixture
def summary_job(tmp_path):
    facts = {
        "convert": {"parameters": 10},
        "train": {
            "train_tokens": 20,
            "tokens_per_second": 2.0,
            "first_val_loss": 7.0,
            "final_val_loss": 5.0,
        },
        "plots": {"unigram_entropy": 5.7001},
    }
    step = steps.build_steps(Recipe())[-1]
    seconds = {"corpus": 1.234, "train": 100.0}
    return Job(step, RunFolder(tmp_path / "run"), Console(io.StringIO()), "key", facts, seconds)


def test_summary(summary_job):
    summary_job.step.run(summary_job)
    assert json.loads((summary_job.root / "summary.json").read_text()) == {
        "parameters": 10,
        "train_tokens": 20,
        "tokens_per_second": 2.0,
        "first_val_loss": 7.0,
        "final_val_loss": 5.0,
        "unigram_entropy": 5.7001,
        "wall_seconds": {"corpus": 1.23, "train": 100.0},
        "total_wall_seconds": 101.23,
    }


@pytest.mark.parametrize("final", [5.01, float("nan")])
def test_a_model_that_has_not_learnt_fails(summary_job, final):
    summary_job.facts["train"]["final_val_loss"] = final
    with pytest.raises(StepError, match=r"must be at least 0.7 nats below the unigram entropy"):
        summary_job.step.run(summary_job)


def test_too_few_steps_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train_iters \(3\) must be at least 4"):
        run_quickstart(str(tmp_path / "run"), train_iters=3)
    assert not (tmp_path / "run").exists()


def test_bad_output_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "quickstart.py", "--output", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: output ({tmp_path}) must be a new or empty folder")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(8.26, "8.3 s"), (59.94, "59.9 s"), (61, "1 min 01 s"), (600, "10 min 00 s")],
)
def test_seconds(value, text):
    assert format_seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (75_300_000, "75.3 MB")]
)
def test_sizes(value, text):
    assert format_size(value) == text
