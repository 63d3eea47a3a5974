"""Every architecture on the device that is there, against its plain twin in float64."""

import pytest

from tests.gpu.machine import ARCHITECTURES

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_twin(measured_on_rank, architecture, dtype):
    measured_on_rank("equals_twin", architecture, "local", dtype)
