"""Output folders appear whole or not at all, from one writer at a time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_satformer.files.output_folder import check_space, check_target, written_atomically

ROOT = Path(__file__).resolve().parents[2]
KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_satformer.files.output_folder import written_atomically
with written_atomically(Path(sys.argv[1])) as folder:
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def write(target: Path, content: str) -> None:
    with written_atomically(target) as folder:
        (folder / "config.json").write_text(content)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_kill_leaves_nothing_under_the_name_and_the_next_run_cleans_up(tmp_path):
    run = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "out"], cwd=ROOT, check=False)
    assert run.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    write(tmp_path / "out", "new")
    assert names(tmp_path) == {"out", "out/config.json"}


def test_an_old_folder_comes_back_after_a_kill_between_the_two_renames(tmp_path):
    write(tmp_path / "out", "first")
    os.rename(tmp_path / "out", tmp_path / ".out.old")
    seen = []
    with written_atomically(tmp_path / "out") as folder:
        seen.append((tmp_path / "out" / "config.json").read_text())
        (folder / "config.json").write_text("second")
    assert seen == ["first"]
    assert names(tmp_path) == {"out", "out/config.json"}
    assert (tmp_path / "out" / "config.json").read_text() == "second"


def test_an_error_leaves_the_old_folder(tmp_path):
    write(tmp_path / "out", "first")
    with pytest.raises(TypeError, match="must be str"):
        write(tmp_path / "out", None)
    assert names(tmp_path) == {"out", "out/config.json"}
    assert (tmp_path / "out" / "config.json").read_text() == "first"


def test_one_writer_at_a_time(tmp_path):
    with written_atomically(tmp_path / "out") as folder:
        (folder / "config.json").write_text("first")
        with pytest.raises(ValueError, match=r"save \(.*out\) is being written by another process"):
            write(tmp_path / "out", "second")
    assert (tmp_path / "out" / "config.json").read_text() == "first"
    write(tmp_path / "out", "third")  # the lock is gone
    assert names(tmp_path) == {"out", "out/config.json"}


def test_what_appears_in_the_meantime_is_not_overwritten(tmp_path):
    def write_late() -> None:
        with written_atomically(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "precious").touch()

    with pytest.raises(ValueError, match="was made by another process in the meantime"):
        write_late()
    assert names(tmp_path) == {"out", "out/precious"}


def test_empty_folders_and_links_are_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    check_target(tmp_path / "link", "config.json", overwrite=False)
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty" / "config.json").read_text() == "new"


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for save in ("file/out", "file/more/out"):
        with pytest.raises(ValueError, match=r"save \(.*out\) cannot be made: Not a directory"):
            write(tmp_path / save, "new")
    (tmp_path / "part").mkdir()
    with pytest.raises(ValueError, match=r"GB free, the model needs 1000000000\.0 GB"):
        check_space(tmp_path / "part", 10**18)
