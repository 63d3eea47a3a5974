"""Every patch of the CPU backend must be needed: Megatron still asks for what it replaces."""

import inspect
import re
from pathlib import Path

import megatron.core
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_satformer.backend import cpu

PACKAGE = Path(megatron.core.__file__).parents[1]
SOURCES = [*PACKAGE.rglob("*.py"), Path(torch.optim.__file__).parent / "optimizer.py"]
TEXT = "\n".join(
    line
    for path in SOURCES
    for line in path.read_text(errors="replace").splitlines()
    if "cuda" in line
)


def patched_names() -> list[str]:
    source = Path(cpu.__file__).read_text()
    body = source[source.index("replacements:") : source.index("for name, value")]
    return re.findall(r'^        "(\w+)":', body, re.MULTILINE)


@pytest.mark.parametrize("name", patched_names())
def test_megatron_still_calls_the_patched_function(name):
    used = re.search(rf"(torch\.)?cuda\.{name}\b", TEXT)
    assert used, f"Megatron no longer uses torch.cuda.{name}: drop it from the CPU backend"


def test_megatron_still_writes_device_cuda():
    assert re.search(r"device=['\"]cuda['\"]", TEXT)


def test_megatron_still_binds_a_factory_as_a_default():
    """And the backend's is still the only one: shards that other ranks have read come into it."""
    assert inspect.signature(ShardedTensor.init_data).parameters["init_fn"].default is torch.empty


def test_megatron_still_sorts_by_cuda_type_names():
    assert "torch.cuda.BFloat16Tensor" in TEXT


def test_megatron_still_counts_packed_tokens_on_a_device_of_its_own():
    assert "torch.device(f'cuda:{torch.cuda.current_device()}')" in TEXT


def test_every_patch_says_who_needs_it():
    source = Path(cpu.__file__).read_text()
    body = source[source.index("replacements:") : source.index("for name, value")]
    lines = [line for line in body.splitlines() if re.match(r'^        "\w+":', line)]
    assert all("  # " in line for line in lines)


def test_cpu_backend_is_never_active_beside_cuda(monkeypatch):
    from megatron_satformer.backend import device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "activate", lambda: pytest.fail("CPU backend beside a GPU"))
    monkeypatch.setattr(device.distributed_optimizer, "activate", lambda: None)
    assert device.choose_device("auto")
    assert device.choose_device("cuda")
