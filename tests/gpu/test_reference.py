"""Every architecture on the device that is there, against its plain twin in float64."""

import pytest

from megatron_satformer.model.architectures import TABLE

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", TABLE)
def test_equals_the_twin(measured_on_rank, architecture, dtype):
    measured_on_rank("equals_twin", architecture, "local", dtype)
