"""Three projections and their norms are, in a checkpoint, what a plain linear_qkv is."""

import pytest

RANKS = "tests.model.ways"


@pytest.mark.parametrize("ranks", [1, 2])
def test_norms_inside_of_the_linears_have_the_same_checkpoint(on_ranks, ranks):
    """As Transformer Engine builds them; its own modules: tests/model/test_specs.py."""
    on_ranks(ranks, f"{RANKS}:fused_norms_hold_the_same_checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"add_bias_linear": True}, {"attention_output_gate": True}, {"num_query_groups": 6}],
    ids=str,
)
def test_the_pieces_are_a_plain_linear_qkv(on_ranks, options):
    """Options that are not exported among them."""
    on_ranks(2, f"{RANKS}:pieces_are_a_plain_linear_qkv", options)
