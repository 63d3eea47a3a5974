import pytest

RANKS = "tests.model.ranks"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "transformer"},
        {"architecture": "transformer", "add_bias_linear": True, "normalization": "LayerNorm"},
        {"architecture": "transformer", "gated_linear_unit": False, "qk_layernorm": False},
        {"architecture": "resformer", "value_residual_last_k": 2},
        {"architecture": "satformer", "add_qkv_bias": False},
        {"architecture": "satformer", "num_query_groups": 6, "value_residual_last_k": 1},
    ],
    ids=str,
)
def test_count_equals_the_built_model(on_ranks, options, tied):
    on_ranks(1, f"{RANKS}:counts_parameters", options, tied)
