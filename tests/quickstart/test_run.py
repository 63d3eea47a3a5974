"""What a run reuses, makes again, removes and says."""

import os
import re
import time

import pytest

from megatron_satformer.quickstart.process import MARK, StepError
from megatron_satformer.quickstart.run import Run, Step

ALL = ["corpus", "tokenizer", "samples"]
# Each step copies what the step before made and adds a line.
COPY = """-c "
import pathlib, sys
source, target, add = sys.argv[1:]
text = pathlib.Path(source).read_text() if source else ''
pathlib.Path(target).parent.mkdir(exist_ok=True)
pathlib.Path(target).write_text(text + add + chr(10))
print(add, 'made in 0.1 s')" """


@pytest.fixture
def go(tmp_path, capsys):
    """Runs three steps; returns the exit code, what was done, and what was told."""

    def start(fail="", word="one", fresh=False):
        done: list[str] = []

        def work(run):
            done.append(run.step.name)
            if run.step.name == fail:
                run.python("""-c "print('before'); raise KeyError('the cause')" """)
            return run.python(run.step.commands)

        def step(name, source, target, add):
            command = f"{COPY} '{source}' '{{root}}/{target}' {add}"
            return Step(name, f"makes {name}", {target.split("/")[0]: "text"}, command, work)

        steps = [
            step("corpus", "", "corpus/text", word),
            step("tokenizer", "{root}/corpus/text", "tokenizer/text", "two"),
            step("samples", "{root}/tokenizer/text", "samples.txt", "three"),
        ]
        run = Run(tmp_path / "run", steps, fresh)
        code = run.go()
        os.close(run.lock)  # as the end of the process would
        told = capsys.readouterr()
        return code, done, told.out + told.err

    return start


def test_makes_all_then_reuses_all(go, tmp_path):
    code, done, told = go()
    assert (code, done) == (0, ALL)
    assert (tmp_path / "run" / "samples.txt").read_text() == "one\ntwo\nthree\n"
    assert [f"[{n}/3] {name:<11}makes {name}\n" in told for n, name in enumerate(ALL, 1)] == [
        True
    ] * 3
    assert re.search(r"\d\d:\d\d   two\n", told)
    code, done, told = go()
    assert (code, done) == (0, [])
    assert [f"[{n}/3] {name:<11}reused: " in told for n, name in enumerate(ALL, 1)] == [True] * 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text("one\n"),
        lambda path: path.write_text("one\ntwx\n"),
    ],
)
def test_a_damaged_output_is_made_again(go, tmp_path, damage):
    go()
    damage(tmp_path / "run" / "tokenizer" / "text")
    code, done, told = go()
    # samples.txt was made from the very same file
    assert (code, done) == (0, ["tokenizer"])
    assert "made again: tokenizer/text is missing or was changed" in told
    assert (tmp_path / "run" / "tokenizer" / "text").read_text() == "one\ntwo\n"
    assert go()[1] == []


def test_other_options_are_made_again_with_all_after_them(go, tmp_path):
    go()
    _, done, told = go(word="uno")
    assert done == ALL
    assert told.count("made again: its options or its input were changed") == 3
    assert (tmp_path / "run" / "samples.txt").read_text() == "uno\ntwo\nthree\n"


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"no": 1}', "\x00"])
def test_an_unreadable_stamp_counts_as_none(go, tmp_path, content):
    go()
    (tmp_path / "run" / MARK / "samples.json").write_text(content)
    assert go()[1] == ["samples"]


def test_a_failed_step_says_which_why_and_how_to_go_on(go, tmp_path):
    code, done, told = go(fail="tokenizer")
    assert (code, done) == (1, ALL[:2])
    assert re.search(r"Step 2 of 3 \(tokenizer\) failed after \d\d:\d\d\.", told)
    assert "Why: KeyError: 'the cause'" in told
    assert "    | before\n" in told
    assert f"All of it: {tmp_path}/run/logs/tokenizer.log" in told
    assert "To go on: put that right and run again; the steps before it" in told
    assert "To start over: --fresh" in told
    assert go()[1] == ALL[1:]


def test_nothing_vouches_for_what_a_failed_step_left(go, tmp_path):
    go()
    (tmp_path / "run" / "tokenizer" / "text").unlink()
    assert go(fail="tokenizer")[0] == 1
    (tmp_path / "run" / "tokenizer").mkdir()
    (tmp_path / "run" / "tokenizer" / "text").write_text("half")
    assert go()[1] == ["tokenizer"]
    assert (tmp_path / "run" / "tokenizer" / "text").read_text() == "one\ntwo\n"


def test_a_step_without_its_output_fails(tmp_path, capsys):
    step = Step("corpus", "makes nothing", {"corpus": ""}, "", lambda run: "done")
    assert Run(tmp_path / "run", [step]).go() == 1
    assert "Why: it ended well but made no corpus." in capsys.readouterr().err


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_a_stop_says_where_and_how_to_go_on(tmp_path, capsys, stop, code):
    def work(run):
        raise stop

    step = Step("corpus", "is stopped", {"corpus": ""}, "", work)
    assert Run(tmp_path / "run", [step]).go() == code
    assert "Interrupted in step 1 of 1 (corpus). To go on: run again" in capsys.readouterr().err


def test_a_stopped_step_goes_on_where_it_saved_and_keeps_its_time(tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def work(run):
        (run.root / "corpus").write_text("half")
        clock[0] += 10
        run.save_stamp(run.stamps["corpus"])
        raise StepError("stopped")

    def finish(run):
        clock[0] += 3
        return (run.root / "corpus").read_text()

    def go(work, command="same"):
        step = Step("corpus", "", {"corpus": ""}, command, work, lambda run, damage: f"on{damage}")
        run = Run(tmp_path / "run", [step])
        code = run.go()
        os.close(run.lock)
        return code, capsys.readouterr().out

    assert go(work)[0] == 1
    assert go(finish, "other")[0] == 1  # no file: another option starts from nothing
    assert go(work)[0] == 1
    code, told = go(finish)
    assert code == 0
    assert "      on[]\n      00:13   half\n" in told


def test_fresh_removes_only_what_is_ours_and_follows_no_link(go, tmp_path):
    go()
    mine = tmp_path / "run" / "notes.txt"
    mine.write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("precious")
    os.rename(tmp_path / "run" / "tokenizer", tmp_path / "moved")
    (tmp_path / "run" / "tokenizer").symlink_to(elsewhere)
    assert go(fresh=True)[1] == ALL
    assert mine.read_text() == "mine"
    assert (elsewhere / "precious").read_text() == "precious"


@pytest.mark.parametrize("fresh", [False, True])
def test_a_foreign_folder_is_refused_and_left_alone(tmp_path, fresh):
    (tmp_path / "corpus").mkdir()
    step = Step("corpus", "", {"corpus": ""}, "")
    with pytest.raises(ValueError, match="must be a new or empty folder or one that the quick"):
        Run(tmp_path, [step], fresh)
    assert os.listdir(tmp_path) == ["corpus"]


def test_one_run_at_a_time(tmp_path):
    step = Step("corpus", "", {"corpus": ""}, "")
    first = Run(tmp_path / "run", [step])
    with pytest.raises(ValueError, match="is in use by another quickstart"):
        Run(tmp_path / "run", [step], fresh=True)
    os.close(first.lock)
    Run(tmp_path / "run", [step])
