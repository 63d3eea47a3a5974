"""Which steps stay, and that a kill anywhere leaves no step that looks whole and is not."""

import pytest

from megatron_satformer.checkpoint.megatron.reader import list_steps
from megatron_satformer.checkpoint.megatron.retention import (
    LAST,
    choose_steps_to_remove,
    make_room,
    put_back,
    remove_step,
)


def write_steps(load, *steps, torn=()):
    for step in (*steps, *torn):
        folder = load / f"iter_{step:07d}"
        folder.mkdir()
        (folder / "weights").write_text(str(step))
        if step in steps:
            (folder / LAST).touch()


@pytest.mark.parametrize(
    ("step", "keep_last", "every", "kept"),
    [
        (50, 1, None, [50, 60]),
        (50, 2, None, [40, 50, 60]),
        (50, 2, 20, [20, 40, 50, 60]),
        (40, 1, None, [40, 50, 60]),  # the run went back to a step, and what lies ahead is not its
        (50, 9, None, [10, 20, 40, 50, 60]),
    ],
)
def test_the_newest_and_every_so_many_stay(tmp_path, step, keep_last, every, kept):
    write_steps(tmp_path, 10, 20, 40, 50, 60, torn=[30])
    for folder in choose_steps_to_remove(tmp_path, step, keep_last, every):
        remove_step(folder)
    assert list_steps(tmp_path) == kept


def test_a_link_is_not_removed(tmp_path):
    write_steps(tmp_path, 20, 30)
    (tmp_path / "iter_0000010").symlink_to(tmp_path / "iter_0000020")
    assert choose_steps_to_remove(tmp_path, 30, 2, None) == []


def test_what_says_that_a_step_is_whole_goes_first(tmp_path, monkeypatch):
    write_steps(tmp_path, 10)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # killed
    remove_step(tmp_path / "iter_0000010")
    assert not (tmp_path / "iter_0000010" / LAST).exists()


def test_a_torn_step_is_not_set_aside(tmp_path):
    write_steps(tmp_path, torn=[10])
    make_room(tmp_path / "iter_0000010")
    make_room(tmp_path / "iter_0000020")
    assert not list(tmp_path.iterdir())
    assert put_back(tmp_path) == []
