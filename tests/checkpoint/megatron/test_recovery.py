"""A torn step is passed over for the newest whole one, never removed and never in silence."""

import json
import os
import pickle
import re
from argparse import Namespace

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, save

from megatron_satformer.checkpoint.megatron.checksums import CHECKSUMS, LISTS, sum_bytes
from megatron_satformer.checkpoint.megatron.reader import TRACKER
from megatron_satformer.checkpoint.megatron.recovery import (
    Recovery,
    check_fresh_start,
    find_recovery,
    find_start,
    find_step_damage,
    is_torn,
    recover,
)
from megatron_satformer.checkpoint.megatron.retention import make_room
from tests.small import PP2, SHAPE

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def write_step(load, step):
    folder = load / f"iter_{step:07d}"
    tensors = {f"layer{n}": torch.randn(40, 50) for n in range(3)}
    save(tensors, storage_writer=FileSystemWriter(folder), no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (load / TRACKER).write_text(str(step))


@pytest.fixture
def load(tmp_path):
    """A folder with steps 10, 20 and 30, the last of them named by the tracker."""
    for step in (10, 20, 30):
        write_step(tmp_path, step)
    return tmp_path


def options(load, rank=0, **others):
    given = {"ckpt_format": "torch_dist", "ckpt_step": None}
    given |= {"use_checkpoint_args": False, "from_transformer": False}
    given |= {"allow_fresh_start": False, "save": None, "verify_checkpoint": True}
    return Namespace(load=str(load), rank=rank, **given | others)


def cut(path):
    os.truncate(path, path.stat().st_size - 100)


def weights(folder):
    return next(folder.glob("*.distcp"))


def tree(load):
    return {path: path.stat().st_size for path in load.rglob("*") if path.name != TRACKER}


DAMAGE = {
    "is missing: it holds part of layer": lambda folder: weights(folder).unlink(),
    "is cut short: ": lambda folder: cut(weights(folder)),
    ".metadata is cut short": lambda folder: cut(folder / ".metadata"),
    ".metadata is missing": lambda folder: (folder / ".metadata").unlink(),
    "metadata.json is missing": lambda folder: (folder / "metadata.json").unlink(),
    "metadata.json is cut short": lambda folder: os.truncate(folder / "metadata.json", 0),
    "iter_0000030 is missing": lambda folder: folder.rename(folder.with_name("moved")),
}


def test_what_is_whole_is_left_alone(load, capsys):
    (load / TRACKER).write_text("20\n")  # set back by hand
    recover(options(load))
    assert (load / TRACKER).read_text() == "20\n"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("told", "damage"), DAMAGE.items(), ids=DAMAGE)
def test_a_torn_step_is_passed_over(load, capsys, told, damage):
    damage(load / "iter_0000030")
    left = tree(load)
    recover(options(load))
    assert (load / TRACKER).read_text() == "20"
    assert tree(load) == left
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"WARNING: {load / 'iter_0000030'}")
    assert told in line
    assert f"{TRACKER} in {load} now names step 20, the newest whole one" in line


def test_the_newest_of_several_is_taken(load):
    for step in (20, 30):
        cut(weights(load / f"iter_00000{step}"))
    assert find_recovery(load).step == 10


@pytest.mark.parametrize(("content", "told"), [(b"", "not ''"), (b"3\xff", "cannot be read")])
def test_an_unreadable_tracker_is_written_again(load, capsys, content, told):
    (load / TRACKER).write_bytes(content)
    recover(options(load))
    assert (load / TRACKER).read_text() == "30"
    assert told in capsys.readouterr().out


def test_a_plan_mends_nothing(load, capsys):
    cut(weights(load / "iter_0000030"))
    planned = options(load, dry_run=True)
    assert is_torn(planned)
    recover(planned)
    assert (load / TRACKER).read_text() == "30"
    assert "The run will go on from step 20" in capsys.readouterr().out
    recover(options(load))
    assert not is_torn(planned)


def test_a_step_without_a_tracker_is_found(load, capsys):
    (load / TRACKER).unlink()
    recover(options(load))
    assert (load / TRACKER).read_text() == "30"
    assert f"has iter_0000030 but no {TRACKER}" in capsys.readouterr().out


def test_no_whole_step_is_refused(load):
    for step in (10, 20, 30):
        cut(weights(load / f"iter_00000{step}"))
    with pytest.raises(ValueError, match=rf"load \({load}\) must hold a whole checkpoint: .*30"):
        recover(options(load))
    assert (load / TRACKER).read_text() == "30"


@pytest.mark.parametrize("tracker", [None, ""])
def test_where_no_step_is_whole_only_a_flag_starts_anew(tmp_path, capsys, tracker):
    write_step(tmp_path, 10)
    (tmp_path / TRACKER).unlink()
    if tracker is not None:
        (tmp_path / TRACKER).write_text(tracker)
    (tmp_path / "iter_0000010" / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"must hold a whole checkpoint: .* --allow-fresh-start"):
        recover(options(tmp_path))
    recover(options(tmp_path, allow_fresh_start=True))
    assert not (tmp_path / TRACKER).exists()
    assert "No step is whole: the run starts anew." in capsys.readouterr().out


def test_a_run_starts_anew_where_nothing_can_be_lost(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "own" / "tensorboard").mkdir(parents=True)
    check_fresh_start(options(tmp_path / "empty"))
    check_fresh_start(options(tmp_path / "own", save=str(tmp_path / "own")))
    check_fresh_start(options(tmp_path / "new", save=f"{tmp_path}/other/../new"))


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (None, "must be a folder of checkpoints, and there is none. Mend the path."),
        ("iter_0000010", "it has iter_0000010 but no latest_checkpointed_iteration.txt, and"),
        ("config.json", "must be a folder of checkpoints, and is a Hugging Face folder"),
        ("notes.txt", "must be a folder of checkpoints, and is none"),
        (".metadata", "must be the folder that steps are in, and is that of one. Give --load"),
    ],
)
def test_another_folder_is_not_trained_from_step_0(tmp_path, made, told):
    load = tmp_path / "typo"
    if made is not None:
        load.mkdir()
        (load / made).touch()
    with pytest.raises(ValueError, match=re.escape(told)):
        check_fresh_start(options(load))
    check_fresh_start(options(load, allow_fresh_start=True))


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_nothing_saved_is_no_damage(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    recover(options(tmp_path / name))
    assert capsys.readouterr().out == ""


def test_a_torn_release_gives_way_to_a_whole_step(load):
    (load / TRACKER).write_text("release")
    (load / "iter_0000010").rename(load / "release")
    assert find_recovery(load) is None
    cut(weights(load / "release"))
    assert find_recovery(load).step == 30


def test_ckpt_step_is_checked_and_never_replaced(load):
    cut(weights(load / "iter_0000020"))
    recover(options(load, ckpt_step=10))
    for step, told in ((20, "is cut short: .*10, 30"), (40, "iter_0000040 is missing.*10, 20, 30")):
        with pytest.raises(ValueError, match=rf"ckpt_step \({step}\) must be a whole .*{told}"):
            recover(options(load, ckpt_step=step))
    assert (load / TRACKER).read_text() == "30"


def test_ckpt_step_needs_a_readable_tracker_all_the_same(load):
    (load / TRACKER).write_text("")
    cut(weights(load / "iter_0000030"))
    recover(options(load, ckpt_step=10))
    assert (load / TRACKER).read_text() == "20"


def test_a_folder_that_cannot_be_written_is_refused(load):
    (load / TRACKER).write_text("")
    (load / f"{TRACKER}.partial").mkdir()  # in place of a read-only disk, which root does not see
    with pytest.raises(ValueError, match=r"must be writable to be mended .* hold 30, the newest"):
        recover(options(load))


def test_the_step_that_a_run_goes_on_from(load):
    assert find_start(load / "nowhere") == 0
    assert find_start(load) == 30
    (load / TRACKER).write_text("20")
    assert find_start(load) == 20
    cut(weights(load / "iter_0000020"))
    assert find_start(load) == 30
    for step in (10, 30):
        cut(weights(load / f"iter_00000{step}"))
    assert find_start(load) == 0
    (load / TRACKER).unlink()
    assert find_start(load) == 0


def give_checksums(folder):
    """As `recording` takes them while Megatron writes."""
    metadata = FileSystemReader(folder).read_metadata()
    for place in metadata.storage_data.values():
        place.crc32 = sum_bytes(folder / place.relative_path, place.offset, place.length)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    sums = {name: sum_bytes(folder / name) for name in LISTS}
    (folder / CHECKSUMS).write_text(json.dumps({"crc32": sums}))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_bit_that_flipped_is_found_by_its_checksum(load, capsys):
    for step in (10, 20, 30):
        give_checksums(load / f"iter_00000{step}")
    assert find_recovery(load) is None
    flip_a_bit(load / "iter_0000030" / "metadata.json")
    assert "metadata.json is not as it was written" in find_recovery(load).torn
    file = weights(load / "iter_0000020")
    flip_a_bit(file)
    with pytest.raises(ValueError, match=rf"ckpt_step \(20\) must be .*{file} is not as it was"):
        recover(options(load, ckpt_step=20))
    recover(options(load, ckpt_step=20, verify_checkpoint=False))
    recover(options(load))
    assert (load / TRACKER).read_text() == "10"
    assert "now names step 10, the newest whole one" in capsys.readouterr().out


def test_a_rank_that_waits_reads_only_the_arguments(load, monkeypatch):
    """Those are all that it takes from the step so early."""
    give_checksums(load / "iter_0000030")
    flip_a_bit(weights(load / "iter_0000030"))
    monkeypatch.setattr("megatron_satformer.checkpoint.megatron.recovery.time.sleep", pytest.fail)
    recover(options(load, rank=1, use_checkpoint_args=True))


@pytest.mark.parametrize("whole", [True, False])
def test_a_step_that_was_being_replaced_is_put_back(load, capsys, whole):
    old = tree(load / "iter_0000030")
    make_room(load / "iter_0000030")
    (load / "iter_0000030").mkdir()
    if whole:
        (load / "iter_0000030" / "metadata.json").write_text("{}")
    recover(options(load, save="elsewhere"))
    assert (tree(load / "iter_0000030") == old) is False, "a folder that others save to is theirs"
    (load / TRACKER).write_text("30")
    recover(options(load, save=str(load)))
    assert (tree(load / "iter_0000030") == old) is not whole
    assert ("iter_0000030 was being written anew" in capsys.readouterr().out) is not whole
    assert not list(load.glob(".*.replaced"))


def test_another_format_is_told_later(load):
    (load / "iter_0000030" / "mp_rank_00").mkdir()
    (load / "iter_0000030" / ".metadata").unlink()
    assert find_step_damage(load / "iter_0000030") == ""
    (load / TRACKER).write_text("")
    recover(options(load, ckpt_format="torch"))
    assert (load / TRACKER).read_text() == ""


def test_other_ranks_only_wait_where_they_read_the_tracker_early(load, monkeypatch):
    module = "megatron_satformer.checkpoint.megatron.recovery"
    (load / TRACKER).write_text("")
    recover(options(load, rank=1))
    waits = []

    def repair(seconds):
        waits.append(find_recovery(load))
        if len(waits) == 3:
            recover(options(load))

    monkeypatch.setattr(f"{module}.time.sleep", repair)
    recover(options(load, rank=1, use_checkpoint_args=True))
    assert waits == [Recovery(f"{load / TRACKER} must hold a step, not ''", 30)] * 3


# --use-checkpoint-args reads the tracker on every rank before any process group exists.
@pytest.mark.parametrize(
    ("ranks", "extra"),
    [(1, ""), pytest.param(2, f"{PP2} --use-checkpoint-args", marks=pytest.mark.slow)],
)
def test_a_run_is_healed_and_goes_on_with_the_same_losses(
    pretrain, data_flags, tmp_path, ranks, extra
):
    flags = [*SHAPE, *data_flags, *extra.split()[:2], "--train-iters", 8]
    flags += ["--save", tmp_path, "--save-interval", 2]
    straight = pretrain(ranks, *flags)
    cut(weights(tmp_path / "iter_0000006"))
    (tmp_path / "iter_0000008" / ".metadata").unlink()
    (tmp_path / TRACKER).write_text("")
    healed = pretrain(ranks, *flags, *extra.split()[2:], "--load", tmp_path)
    assert f"WARNING: {tmp_path / TRACKER} must hold a step, not ''" in healed.output
    assert healed.output.count("now names step 4, the newest whole one") == 1
    assert list(healed.scalars("lm loss")) == [5, 6, 7, 8]
    assert healed.losses == straight.losses[4:]
    # the torn folders were written over
    assert (tmp_path / TRACKER).read_text() == "8"
    assert [find_step_damage(tmp_path / f"iter_000000{n}") for n in (2, 4, 6, 8)] == [""] * 4


def test_nothing_whole_ends_a_run_with_one_line(pretrain, data_flags, tmp_path):
    write_step(tmp_path, 2)
    cut(weights(tmp_path / "iter_0000002"))
    run = pretrain(1, *SHAPE, *data_flags, "--train-iters", 2, "--load", tmp_path, code=2)
    [line] = [line for line in run.output.splitlines() if "error" in line]
    assert f"load ({tmp_path}) must hold a whole checkpoint" in line
