"""tools/install.sh finds the right Python, or says what to install, and makes .venv of it."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ["bash", "cat", "dirname", "env"]


@pytest.fixture
def machine(tmp_path):
    """A machine with no Python: a PATH of a few tools, and an empty home."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name in NEEDED:
        (bin_dir / name).symlink_to(shutil.which(name))
    (tmp_path / "checkout" / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tools/install.sh", tmp_path / "checkout/tools")
    return tmp_path


def add_command(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return path


def add_python(path, version, state="ok"):
    """An interpreter that answers the probe as a real one would."""
    return add_command(path, f'cat >/dev/null; echo "{version} {state} {path}"')


def find_python(machine, **environment):
    return subprocess.run(
        ["bash", "tools/install.sh", "--find-python"],
        cwd=machine / "checkout",
        env={"PATH": str(machine / "bin"), "HOME": str(machine), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def found(machine, **environment):
    result = find_python(machine, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def refused(machine, **environment):
    result = find_python(machine, **environment)
    assert result.returncode != 0
    message = result.stderr.strip()
    assert "\n" not in message
    return message


def test_real_interpreter(machine):
    base = Path(sys._base_executable)
    (machine / "bin/python3").symlink_to(base)
    assert os.path.realpath(found(machine)) == os.path.realpath(base)


def test_nothing_found(machine):
    message = refused(machine)
    assert "apt-get install python3.12 python3.12-venv" in message
    assert "uv python install 3.12" in message


def test_too_old_and_too_new(machine):
    add_python(machine / "bin/python3", "3.11")
    add_python(machine / "bin/python", "3.14")
    assert "No CPython 3.12 or 3.13" in refused(machine)


def test_free_threaded_has_no_wheels(machine):
    add_python(machine / "bin/python3.13", "3.13", "no-wheels")
    assert "No CPython 3.12 or 3.13" in refused(machine)


def test_dead_shim_is_passed_over(machine):
    add_command(machine / "bin/python3.12", "echo 'pyenv: python3.12: command not found'; exit 127")
    real = add_python(machine / ".pyenv/versions/3.12.1/bin/python3.12", "3.12")
    assert found(machine) == str(real)


def test_pyenv_root(machine):
    real = add_python(machine / "elsewhere/versions/3.13.2/bin/python3.13", "3.13")
    assert found(machine, PYENV_ROOT=str(machine / "elsewhere")) == str(real)


def test_3_12_wins_wherever_it_is(machine):
    add_python(machine / "bin/python3", "3.13")
    tested = add_python(machine / ".pyenv/versions/3.12.1/bin/python3.12", "3.12")
    assert found(machine) == str(tested)


def test_without_ensurepip(machine):
    debian = add_python(machine / "bin/python3", "3.12", "no-ensurepip")
    assert f"Python 3.12 at {debian} " in refused(machine)
    assert "apt-get install python3.12-venv" in refused(machine)
    complete = add_python(machine / "bin/python3.13", "3.13")
    assert found(machine) == str(complete)


def test_uv_makes_up_for_ensurepip(machine):
    debian = add_python(machine / "bin/python3", "3.12", "no-ensurepip")
    add_command(machine / "bin/uv", "exit 1")
    assert found(machine) == str(debian)


def test_uv_installs(machine):
    managed = add_python(machine / "uv-python/python3.12", "3.12")
    add_command(
        machine / "bin/uv",
        f'case "$*" in "python install 3.12") echo >"$HOME/done" ;;'
        f' "python find --system 3.12") cat "$HOME/done" 2>/dev/null && echo {managed} ;; esac',
    )
    assert found(machine) == str(managed)


def test_uv_without_network(machine):
    add_command(machine / "bin/uv", "exit 1")
    assert "No CPython 3.12 or 3.13" in refused(machine)


def test_named_python(machine):
    old = add_python(machine / "bin/python3.11", "3.11")
    good = add_python(machine / "opt/python", "3.13")
    add_python(machine / "bin/python3.12", "3.12")
    assert found(machine, PYTHON=str(good)) == str(good)
    assert f"PYTHON ({old}) is Python 3.11" in refused(machine, PYTHON=str(old))
    assert "PYTHON (/nowhere) does not run" in refused(machine, PYTHON="/nowhere")


def test_unknown_venv_kind(machine):
    assert "VENV (conda) must be own or system" in refused(machine, VENV="conda")


def test_system_constraints_keep_what_is_there(tmp_path):
    import torch

    pins = tmp_path / "constraints.txt"
    pins.write_text("# pins\ntorch==1.0\nnumpy==1.0\nno-such-package==3.2\n")
    output = subprocess.run(
        [sys.executable, "tools/system_torch.py", "constraints", str(pins)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert any(line.startswith(f"torch=={torch.__version__.split('+')[0]}") for line in output)
    assert "no-such-package==3.2" in output
    assert not [line for line in output if line.startswith("numpy") or line == "torch==1.0"]


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-vllm.txt"])
def test_constraints_are_exact(file):
    lines = (ROOT / file).read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 and "@" not in line for line in pins)
    names = [line.partition("==")[0].lower() for line in pins]
    assert len(set(names)) == len(names)
    assert "apex" not in names  # the package of that name is an unrelated project


TOOLS = "chmod cp cut du flock grep mkdir mv rm sed sha256sum sleep tail touch".split()
# Answers as an interpreter does, and writes down what pip is asked for. `venv` makes another one.
FAKE_PYTHON = r"""
case "$1 $2" in
    "-m venv") [[ -z ${DIE_IN_VENV:-} ]] || kill -9 $PPID
        mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    "-m pip") echo "$*" >>"$HOME/pip"
        [[ $3 != install ]] || { echo "Collecting torch"; exit "${PIP_FAILS:-0}"; } ;;
    "-c import sys;"*) echo "$0" ;;
    tools/system_torch.py*) echo "keeping torch" ;;
    "-c "*) echo "/base ${FAKE_VERSION:-3.12}" ;;
    "- ") read -r _ first; cat >/dev/null
        [[ $first == importlib* ]] && echo "torch 9" || echo "3.12 ok $0" ;;
esac
"""


@pytest.fixture
def checkout(machine):
    """A checkout on a machine that has one Python."""
    for name in TOOLS:
        (machine / "bin" / name).symlink_to(shutil.which(name))
    for name in ("constraints.txt", "pyproject.toml", "setup.py"):
        (machine / "checkout" / name).write_text(name)
    add_command(machine / "bin/python3.12", FAKE_PYTHON)
    return machine / "checkout"


def install(checkout, code=0, **environment):
    """Installs; returns what was told, and pip's installations by their last words."""
    pip = checkout.parent / "pip"
    pip.write_text("")
    done = subprocess.run(
        ["bash", "tools/install.sh"],
        cwd=checkout,
        env={"PATH": str(checkout.parent / "bin"), "HOME": str(checkout.parent), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stdout + done.stderr
    calls = [line.split()[-1] for line in pip.read_text().splitlines() if " install " in line]
    return done.stdout + done.stderr, calls


PACKAGES = ["setuptools>=77", ".[data,dev,eval,hf,logging,muon]"]


def test_installs_once(checkout):
    told, packages = install(checkout)
    assert packages == PACKAGES
    assert "torch 9" in told
    assert "Installed in" in told
    assert install(checkout) == ("", [])


@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml", "setup.py"])
def test_another_pin_is_installed_into_the_same_environment(checkout, name):
    install(checkout)
    (checkout / name).write_text("changed")
    told, packages = install(checkout)
    assert "continuing in .venv" in told
    assert packages == PACKAGES


def test_killed_in_the_empty_environment(checkout):
    install(checkout, code=-9, DIE_IN_VENV="1")
    assert (checkout / ".venv").is_dir()
    told, packages = install(checkout)
    assert "replacing .venv: it is incomplete" in told
    assert packages == PACKAGES
    assert not list(checkout.glob(".venv.old*"))


def test_failed_in_the_packages(checkout):
    told, _ = install(checkout, code=1, PIP_FAILS="1")
    assert "Collecting torch\n" in told
    assert "pip failed (the whole log is .venv/install.log). Run the same command again" in told
    # pip had written all of one package, and not yet the list of files of the other
    site = checkout / ".venv/lib/python3.12/site-packages"
    for name, files in (("whole", ["METADATA", "RECORD"]), ("half", ["METADATA"])):
        (site / f"{name}.dist-info").mkdir(parents=True)
        for file in files:
            (site / f"{name}.dist-info" / file).write_text("")
    told, packages = install(checkout)
    assert "continuing in .venv" in told
    assert packages == PACKAGES
    assert [path.name for path in site.iterdir()] == ["whole.dist-info"]


def test_moved_environment_is_made_again(checkout):
    install(checkout)
    moved = checkout.rename(checkout.with_name("moved"))
    told, packages = install(moved)
    assert "replacing .venv: it was moved or copied" in told
    assert packages == PACKAGES


def test_another_python_makes_it_again(checkout):
    install(checkout)
    python = str(checkout.parent / "bin/python3.12")
    assert "continuing in .venv" in install(checkout, PYTHON=python)[0]
    other = add_command(checkout.parent / "opt/python", f"FAKE_VERSION=3.13\n{FAKE_PYTHON}")
    told, _ = install(checkout, PYTHON=str(other))
    assert f"replacing .venv: it was built on another Python than {other}" in told


def test_an_environment_of_somebody_else(checkout):
    add_command(checkout / ".venv/bin/python", FAKE_PYTHON)
    told, _ = install(checkout, code=1, VENV="system")
    assert ".venv was not made by this script and does not fit" in told
    told, packages = install(checkout)
    assert "continuing in .venv" in told
    assert packages == PACKAGES


def test_system_keeps_its_mode_after_a_kill(checkout):
    install(checkout, code=-9, DIE_IN_VENV="1", VENV="system")
    told, packages = install(checkout)
    assert "replacing .venv: it is incomplete" in told
    assert packages == PACKAGES
    assert (checkout / ".venv/.satformer-mode").read_text() == "system\n"
    told, _ = install(checkout, VENV="own")
    assert "replacing .venv: it was made with VENV=system" in told


def test_waits_for_another_installation(checkout):
    with (checkout / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = subprocess.Popen(
            ["bash", "tools/install.sh"],
            cwd=checkout,
            env={"PATH": str(checkout.parent / "bin"), "HOME": str(checkout.parent)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert second.stdout.readline() == "Another installation is running: waiting for it.\n"
        assert not (checkout / ".venv").exists()
    assert second.communicate(timeout=60)[0].endswith(" s.\n")
    assert second.returncode == 0
