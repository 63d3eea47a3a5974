"""Each line of the doctor, where all is well and where it is not: real processes, disks, limits."""

import resource
import sys
from dataclasses import replace

import pytest

from megatron_satformer.machine import checks
from megatron_satformer.machine.parts import PARTS

WANDB = next(part for part in PARTS if part.package == "wandb")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs a module of this code for what is started, under the name it is given."""

    def install(name, code):
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return install


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise FileNotFoundError('half of it')", "FileNotFoundError: half of it"),
        ("import no_such_library", "No module named 'no_such_library'"),
        ("import os; os.abort()", "ended with -6"),
    ],
)
def test_a_part_that_is_there_and_does_not_import(installed, code, told):
    installed("broken_part", code)
    part = replace(WANDB, package="broken", module="broken_part", code="import broken_part")
    found = checks.check_part(part)
    assert (found.state, found.advice) == ("note", part.install)
    assert "does not import: " in found.what
    assert told in found.what
    assert checks.check_part(replace(part, needed=True)).state == "FAIL"


def test_a_part_that_is_not_there():
    found = checks.check_part(replace(WANDB, package="nothing", module="no_such_part"))
    assert found.state == "note"
    assert found.what == f"not installed; for {WANDB.use}"


def test_a_part_that_works():
    numpy = PARTS[0]
    assert (numpy.package, numpy.needed) == ("numpy", True)
    found = checks.check_part(numpy)
    assert (found.state, found.advice) == ("ok", "")
    assert found.what == sys.modules["numpy"].__version__


def test_another_version_than_the_tested_one_is_told():
    assert "(tested with " in checks._tested("numpy", "1.0")
    assert checks._tested("no-such-package", "1.0") == ""


@pytest.mark.parametrize(
    ("cards", "states", "told"),
    [
        ({"cuda": None, "gpus": []}, ["note"], "built without it"),
        ({"cuda": "13.0", "gpus": []}, ["note"], "torch sees no GPU"),
        (
            {"cuda": "13.0", "nccl": "2.27", "gpus": ["A", "A"], "memory": [2**36, 2**36]},
            ["ok", "ok"],
            "2: A (64 GiB), A (64 GiB)",
        ),
    ],
)
def test_cards(cards, states, told):
    found = [*checks.check_cards(cards)]
    assert [finding.state for finding in found] == states
    assert told in found[-1].what


@pytest.mark.slow
def test_gloo_between_two_processes(monkeypatch):
    assert checks.check_collective("gloo", 2).state == "ok"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_interface")
    found = checks.check_collective("gloo", 2)
    assert found.state == "FAIL"
    assert "GLOO_SOCKET_IFNAME" in found.advice


def test_disk(tmp_path, monkeypatch):
    found = checks.check_disk(tmp_path, 8)
    assert "MB/s, reads " in found.what
    assert [*tmp_path.iterdir()] == []
    assert checks.check_disk(tmp_path / "nowhere", 8).state == "FAIL"
    monkeypatch.setattr(checks, "DISK_SPEED", 1e15)
    slow = checks.check_disk(tmp_path, 8)
    assert slow.state == "note"
    assert "a save of 1.3B takes" in slow.advice


def test_shared_memory(tmp_path, monkeypatch):
    assert checks.check_shared_memory(tmp_path / "nowhere").advice == (
        "give training --num-workers 0"
    )
    monkeypatch.setattr(checks, "SHARED_MEMORY", 2**60)
    assert "--shm-size" in checks.check_shared_memory(tmp_path).advice


def test_space(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "FREE_DISK", 2**60)
    assert checks.check_space(tmp_path).state == "note"


@pytest.mark.parametrize(("soft", "state"), [(256, "note"), (None, "ok")])
def test_open_files(soft, state):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = before[1]
    if soft is None and hard < checks.OPEN_FILES:
        pytest.skip("this machine's own limit is low")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft or hard, hard))
        found = checks.check_open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert found.state == state
    if soft:
        assert found.advice.startswith("ulimit -n ")
