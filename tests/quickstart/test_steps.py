"""The steps fit together; CI runs the whole of them (make quickstart)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_satformer.quickstart.run import Run
from megatron_satformer.quickstart.steps import build_steps, run_quickstart, training_flags

ROOT = Path(__file__).resolve().parents[2]


def test_each_step_reads_only_what_was_made_before():
    made: set[str] = set()
    for step in build_steps(200):
        made |= step.outputs.keys()
        used = {part.split("/")[0] for part in re.findall(r"\{root\}/(\S+)", step.commands)}
        assert used <= made
    assert len(made) == 11


def test_a_short_run_is_validated_and_saved_too():
    for interval in ("--eval-interval 4 ", "--save-interval 4 ", "--lr-warmup-iters 2 "):
        assert interval in training_flags(8)
    for interval in ("--eval-interval 30 ", "--save-interval 50 ", "--lr-warmup-iters 20 "):
        assert interval in training_flags(200)


def test_too_few_steps_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train_iters \(3\) must be at least 4"):
        run_quickstart(str(tmp_path / "run"), train_iters=3)
    assert not (tmp_path / "run").exists()


def test_the_table_tells_what_was_made(tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"

    def go(run):
        (run.root / "hf").mkdir()
        (run.root / "hf" / "model").write_bytes(b"x" * 1500)
        (run.root / "train.log").write_bytes(b"x" * 12)
        return 0

    monkeypatch.setattr(Run, "go", go)
    assert run_quickstart(str(output)) == 0
    table = capsys.readouterr().out.splitlines()[2:-2]
    assert table[0].split() == ["file", "size", "what", "it", "is"]
    rows = {line.split()[0]: line.split()[1:4] for line in table[1:]}
    assert len(rows) == 11
    assert rows[f"{output}/hf"] == ["1.50kB", "the", "model"]
    assert rows[f"{output}/train.log"] == ["12.0B", "everything", "that"]


def test_a_failed_run_has_no_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Run, "go", lambda run: 1)
    assert run_quickstart(str(tmp_path / "run")) == 1
    assert "Done" not in capsys.readouterr().out


@pytest.mark.parametrize("target", ["", "file"])
def test_a_bad_output_is_one_line(tmp_path, target):
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "quickstart.py", "--output", tmp_path / target],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    told = "Not a directory" if target else f"output ({tmp_path}) must be a new or empty folder"
    assert done.stderr.startswith("error: ")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_importing_it_imports_neither_torch_nor_megatron():
    program = "import sys, megatron_satformer.quickstart.steps\n"
    program += "print({'torch', 'megatron'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "set()\n"
