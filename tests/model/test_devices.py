"""Forward passes mix no devices and ask the host for no value: seen without a GPU."""

import pytest

from megatron_satformer.model.architectures import TABLE
from tests.parallel.layouts import some_fast


@pytest.mark.parametrize("architecture", some_fast(TABLE))
def test_a_forward_pass_stays_on_the_gpu(on_ranks, architecture):
    options = {"architecture": architecture}
    on_ranks(1, "tests.model.ranks:forward_on_a_gpu_that_is_not_there", options)
