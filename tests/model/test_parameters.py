import pytest

RANKS = "tests.model.ranks"
MOE = {"num_moe_experts": 4, "moe_ffn_hidden_size": 20}


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
        {"architecture": "satformer", "attention_output_gate": True},
        {"architecture": "satformer", "moe_layer_freq": 3} | MOE,
        {"architecture": "transformer", "moe_layer_freq": [0, 1, 1, 0], "add_bias_linear": True}
        | MOE,
        {"moe_shared_expert_intermediate_size": 28, "moe_shared_expert_gate": True} | MOE,
    ],
    ids=str,
)
def test_count_equals_the_built_model(on_ranks, options, tied):
    on_ranks(1, f"{RANKS}:counts_parameters", options, tied)
