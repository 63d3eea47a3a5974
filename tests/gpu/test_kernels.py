"""Triton's kernels on a GPU against plain torch, forward and backward."""

import pytest

from tests.gpu.machine import GPU
from tests.model.kernels import CHECKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not GPU, reason="needs a GPU"),
]


@pytest.mark.parametrize("check", CHECKS)
def test_kernels_equal_plain_torch(on_ranks, check):
    on_ranks(1, "tests.model.kernels:check", check)
