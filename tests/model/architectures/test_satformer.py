"""SATFormer's gates: every function, biases and starts, against the plain twin."""

import pytest
import torch

from megatron_satformer.model.architectures.gate_options import VALUE_GATES, gate_rank
from tests.models import build_config

RANKS = "tests.model.ranks"
SHAPE = {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 4}
VARIANTS = {
    **{gate: {"value_gate": gate} for gate in VALUE_GATES},
    "offset": {"value_gate": "tanh", "value_gate_offset": 1.0},
    "lerp with bias": {"value_gate": "lerp", "value_gate_bias": True, "num_query_groups": 6},
    "last 1": {"value_residual_last_k": 1},
    "gate bias": {"value_gate_bias": True},
    "both biases": {"value_gate_bias": True, "add_qkv_bias": True},
    "qkv bias": {"add_qkv_bias": True},
    "MHA": {"num_query_groups": 6},
    "no QK-norm": {"qk_layernorm": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_every_gradient_equal_the_twin(on_ranks, variant):
    on_ranks(1, f"{RANKS}:equals_reference", VARIANTS[variant])


@pytest.mark.parametrize(
    "gate", ["relu", "softmax", "softmax_sigmoid", "lerp_channels", "constant"]
)
def test_tensor_parallel_ranks_equal_the_twin(on_ranks, gate):
    on_ranks(2, f"{RANKS}:equals_reference", {"value_gate": gate})


def test_zero_gate_equals_transformer(on_ranks):
    on_ranks(1, f"{RANKS}:zero_gate_is_transformer")


def test_constant_gates_start_as_a_transformer(on_ranks):
    options = {"architecture": "satformer", "value_gate": "constant"}
    on_ranks(1, f"{RANKS}:starts_as_a_transformer", options)


def test_gate_init_std(on_ranks):
    on_ranks(1, f"{RANKS}:gate_init_std", 0.5)


def test_gate_bias_moves_alone(on_ranks):
    on_ranks(1, f"{RANKS}:gate_bias_alone")


@pytest.mark.parametrize(
    ("gate", "told"),
    [
        ("relu", "would never open. Use --value-gate tanh or identity"),
        ("sigmoid", "starts open. Only tanh, identity, constant start at 0 and learn."),
        ("tanh", None),
        ("identity", None),
        ("softplus", "starts open"),
        ("leaky_relu", "has a hundredth of its gradient at 0"),
    ],
)
def test_a_start_at_exactly_zero(gate, told):
    warning = build_config(**SHAPE, value_gate=gate, value_gate_init_std=0.0).warning
    assert (warning is None) if told is None else (told in warning)
    assert build_config(**SHAPE, value_gate=gate, value_gate_init_std=1e-3).warning is None


def test_summary():
    assert build_config(**SHAPE, value_residual_last_k=2, value_gate_bias=True).summary == (
        "satformer, 2 of 4 layers mix V1, relu gate with bias"
    )
    assert build_config("resformer", **SHAPE).summary == "resformer, 3 of 4 layers mix V1"


def test_gates_never_leave_their_range():
    from megatron_satformer.model.gates import apply_gate

    logits = torch.randn(5, 2, 3) * 4
    assert (apply_gate(logits, "relu", None) >= 0).all()
    assert (apply_gate(logits, "sigmoid", None) - 0.5).abs().max() <= 0.5
    assert apply_gate(logits, "tanh", None).abs().max() <= 1
    assert torch.equal(apply_gate(logits, "identity", None), logits)


def test_gates_that_cannot_die_have_a_gradient_where_relu_has_none():
    from megatron_satformer.model.gates import apply_gate

    for gate in ("relu", "softplus", "leaky_relu"):
        logits = torch.tensor([[[-3.0, -0.5]]], requires_grad=True)
        apply_gate(logits, gate, None).sum().backward()
        assert (logits.grad.abs().min() > 0) == (gate != "relu")


def test_rank_of_the_map():
    """RWKV-7's: 1.3 sqrt(h), in multiples of 32 and at least 32."""
    shape = SHAPE | {"value_gate": "lerp_channels"}
    wanted = {24: 32, 768: 32, 1536: 64, 2048: 64, 4096: 96}
    assert {h: gate_rank(build_config(**shape | {"hidden_size": h})) for h in wanted} == wanted
    assert gate_rank(build_config(**shape, value_gate_rank=5)) == 5


def test_where_biases_start(on_ranks):
    on_ranks(1, f"{RANKS}:gate_bias_init", 0.7)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"value_gate_bias_init": 1.0},
            r"value_gate_bias_init \(1.0\) must come with --value-gate-b",
        ),
        (
            {"value_gate": "constant", "value_gate_bias": True},
            r"value_gate_bias \(True\) must not be given with value_gate \(constant\)",
        ),
        (
            {"value_gate": "constant", "value_gate_init_std": 0.1},
            r"value_gate_init_std \(0.1\) must not be given with value_gate \(constant\)",
        ),
        (
            {"value_gate": "lerp", "value_gate_offset": 1.0},
            r"value_gate_offset \(1.0\) must not be given with value_gate \(lerp\), whose shares",
        ),
        ({"value_gate_offset": float("nan")}, r"value_gate_offset \(nan\) must be finite"),
        (
            {"value_gate_rank": 8},
            r"value_gate_rank \(8\) must be at least 1, and come with value_g",
        ),
        (
            {"value_gate": "lerp_channels", "value_gate_rank": 5, "tensor_model_parallel_size": 2},
            r"value_gate_rank \(5\) must be a multiple of tensor_model_parallel_size \(2\)",
        ),
    ],
    ids=str,
)
def test_what_a_gate_does_not_have_is_told(options, told):
    with pytest.raises(ValueError, match=told):
        build_config(**SHAPE, **options)
