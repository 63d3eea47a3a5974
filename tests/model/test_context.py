"""Context-parallel ranks, and packed documents, alone and on several of them."""

import pytest

from megatron_satformer.model.architectures import TABLE


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gathers_in_the_order_of_the_sequence(on_ranks, ranks):
    on_ranks(ranks, "tests.model.packed:gathers_in_order", ranks)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("architecture", TABLE)
def test_packed_documents_equal_those_run_alone(on_ranks, architecture, ranks):
    options = {"architecture": architecture}
    on_ranks(ranks, "tests.model.packed:equals_documents_alone", ranks, options)
