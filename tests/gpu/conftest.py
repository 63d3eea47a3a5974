import json

import pytest
import torch

from tests.gpu.machine import GPU


def pytest_collection_modifyitems(items):
    """All tests of an architecture in one process, which makes its checkpoint once."""
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.xdist_group(item.callspec.params.get("architecture")))


@pytest.fixture(scope="session")
def trained(started, pretrain):
    """Five steps from an architecture's perturbed checkpoint with more flags; made once."""
    made = {}

    def train(architecture, more, ranks=1):
        if (architecture, more) not in made:
            flags, _ = started(architecture)
            made[architecture, more] = pretrain(ranks, *flags, *more.split())
        return made[architecture, more]

    return train


@pytest.fixture
def measured_on_rank(on_ranks, tmp_path, record_property):
    """Runs a function of checks.py, which writes figures; they go into the report."""

    def run(name, *args):
        target = tmp_path / "figures.json"
        try:
            on_ranks(1, f"tests.gpu.checks:{name}", *args, str(target))
        finally:
            if target.exists():
                record_property("figures", {"check": name, **json.loads(target.read_text())})

    return run


@pytest.fixture
def two_devices():
    if GPU and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
