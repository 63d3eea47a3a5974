"""tools/doctor.py itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_satformer.machine.parts import PARTS

TOOL = Path(__file__).resolve().parents[1] / "tools/doctor.py"


def run_doctor(*flags, **environment):
    command = [sys.executable, str(TOOL), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **environment)


@pytest.mark.slow
def test_a_line_for_each_and_nothing_fails_here(tmp_path):
    run = run_doctor("--folder", tmp_path, "--megabytes", 8)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    named = [line[5:28].strip() for line in lines[:-1]]
    assert set(named) >= {part.package for part in PARTS} | {"torch", "CUDA", "gloo between 2"}
    assert len(set(named)) == len(named)
    assert lines[-1].endswith(" 0 failed")
    assert all("  -> " in line for line in lines if line.startswith("note"))


def test_a_folder_that_is_not_there():
    run = run_doctor("--folder", "/nowhere")
    assert run.returncode == 2
    assert run.stderr == "error: folder (/nowhere) must be a folder that exists. Make it first.\n"
