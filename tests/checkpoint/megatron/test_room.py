"""The size of a checkpoint is known before the first is saved, and whether the disk holds it."""

import re
from argparse import Namespace

import pytest

from megatron_satformer.checkpoint.megatron import room as checked
from megatron_satformer.checkpoint.megatron.room import check_room
from tests.small import SHAPE


@pytest.mark.parametrize(
    "extra",
    ["", *(pytest.param(e, marks=pytest.mark.slow) for e in ("--bf16", "--bf16 --no-save-optim"))],
)
def test_the_size_of_a_checkpoint_is_told(pretrain, data_flags, tmp_path, extra):
    """But for the headers of many small tensors."""
    flags = [*SHAPE, *data_flags, "--hidden-size", 256, "--ffn-hidden-size", 1024]
    flags += ["--train-iters", 1, "--save", tmp_path, "--save-interval", 1, *extra.split()]
    run = pretrain(1, *flags, board=False)
    told = re.search(r"a checkpoint takes about (\S+) GB, and ", run.output)
    size = sum(file.stat().st_size for file in (tmp_path / "iter_0000001").iterdir())
    assert size == pytest.approx(float(told[1]) * 1e9, rel=0.05)


def room(tmp_path, monkeypatch, **options):
    given = {"save": str(tmp_path), "train_iters": 100, "train_samples": None, "keep_last": None}
    given |= {"save_interval": 10, "save_retain_interval": None, "global_batch_size": 8}
    given["dry_run"] = False
    monkeypatch.setattr(checked, "expected_bytes", lambda *_: 10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Namespace(free=options.pop("free")))
    check_room(Namespace(**given | options), Namespace(multi_latent_attention=False))


def test_a_disk_that_is_too_small_is_told_before_the_start(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"room for a checkpoint: .* 1 GB, and 0.5 GB are free"):
        room(tmp_path, monkeypatch, free=5e8)
    room(tmp_path, monkeypatch, free=5e9)
    assert "this run saves 10 and keeps 10 at once. --keep-last" in capsys.readouterr().out
    room(tmp_path, monkeypatch, free=5e9, keep_last=2, save_retain_interval=50)
    assert "WARNING" not in capsys.readouterr().out
    room(tmp_path, monkeypatch, free=5e9, train_iters=30)
    assert "WARNING" not in capsys.readouterr().out
