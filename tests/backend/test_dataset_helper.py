"""Megatron starts from an installed wheel, which has no Makefile for its dataset helper."""

from pathlib import Path

from megatron.core.datasets import utils

from megatron_satformer.backend import dataset_helper


def test_nothing_is_compiled_where_there_is_no_makefile(monkeypatch):
    """The real compile_helpers ends the process there."""
    monkeypatch.setattr(utils, "compile_helpers", utils.compile_helpers)
    folder = Path(utils.__file__).parent
    assert not (folder / "Makefile").exists(), "the wheel has one now: this mend can go"
    dataset_helper.activate()
    utils.compile_helpers()
