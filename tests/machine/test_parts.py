"""Versions and imports, in processes of their own."""

import platform

import pytest
import torch

from megatron_satformer.machine import parts


def test_cards_are_torchs():
    cards, failure = parts.find_cards()
    assert not failure
    assert cards["torch"] == torch.__version__
    assert len(cards["gpus"]) == (torch.cuda.device_count() if "nccl" in cards else 0)


def test_a_torch_that_does_not_import_is_told(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('libnccl.so.2 not found')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert parts.find_cards() == ({}, "ImportError: libnccl.so.2 not found")


def test_what_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(parts, "SECONDS", 1)
    assert parts.try_code("import time; time.sleep(60)") == ("", "not done in 1 seconds")


def test_names_are_those_of_packages_once():
    names = [part.package for part in parts.PARTS]
    assert len(set(names)) == len(names)
    assert {part.package for part in parts.PARTS if part.needed} >= {"megatron-core", "numpy"}


@pytest.mark.slow
def test_the_report_has_every_part():
    found = parts.describe_machine()
    assert found["python"] == platform.python_version()
    assert found["megatron-core"] == "0.19.2"
    assert found.keys() >= {part.package for part in parts.PARTS}
