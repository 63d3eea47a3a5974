import pytest

from megatron_satformer.config import VALUE_GATES

RANKS = "tests.model.ranks"
VARIANTS = {
    "transformer": {"architecture": "transformer"},
    "transformer, qkv bias": {"architecture": "transformer", "add_qkv_bias": True},
    "resformer": {"architecture": "resformer"},
    "resformer, last 2": {"architecture": "resformer", "value_residual_last_k": 2},
    **{f"satformer, {gate}": {"value_gate": gate} for gate in VALUE_GATES},
    "satformer, last 1": {"value_residual_last_k": 1},
    "satformer, gate bias": {"value_gate_bias": True},
    "satformer, both biases": {"value_gate_bias": True, "add_qkv_bias": True},
    "satformer, qkv bias": {"add_qkv_bias": True},
    "satformer, MHA": {"num_query_groups": 6},
    "satformer, no QK-norm": {"qk_layernorm": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_every_gradient_equal_the_reference(on_ranks, variant):
    on_ranks(1, f"{RANKS}:equals_reference", VARIANTS[variant])


@pytest.mark.parametrize("architecture", ["transformer", "resformer", "satformer"])
def test_untied_embeddings_equal_the_reference(on_ranks, architecture):
    on_ranks(1, f"{RANKS}:equals_reference", {"architecture": architecture}, False)


@pytest.mark.parametrize(
    "variant", ["resformer", "satformer, relu", "satformer, softmax", "satformer, softmax_sigmoid"]
)
def test_tensor_parallel_ranks_equal_the_reference(on_ranks, variant):
    on_ranks(2, f"{RANKS}:equals_reference", VARIANTS[variant])


def test_zero_gate_equals_transformer(on_ranks):
    on_ranks(1, f"{RANKS}:zero_gate_is_transformer")


def test_gate_init_std(on_ranks):
    on_ranks(1, f"{RANKS}:gate_init_std", 0.5)


def test_gate_bias_moves_alone(on_ranks):
    on_ranks(1, f"{RANKS}:gate_bias_alone")


@pytest.mark.parametrize(
    "options",
    [
        {"recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_method": "uniform", "recompute_num_layers": 3},
        {"recompute_method": "block", "recompute_num_layers": 2},
    ],
    ids=str,
)
def test_full_recompute_is_bit_equal(on_ranks, options):
    on_ranks(1, f"{RANKS}:recompute_equals_plain", {"recompute_granularity": "full"} | options)
