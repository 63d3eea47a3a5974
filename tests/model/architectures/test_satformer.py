"""SATFormer's gates: every function, biases and starts, against the plain twin."""

import pytest
import torch

from megatron_satformer.model.architectures.satformer import VALUE_GATES
from tests.models import build_config

RANKS = "tests.model.ranks"
SHAPE = {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 4}
VARIANTS = {
    **{gate: {"value_gate": gate} for gate in VALUE_GATES},
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


@pytest.mark.parametrize("gate", ["relu", "softmax", "softmax_sigmoid"])
def test_tensor_parallel_ranks_equal_the_twin(on_ranks, gate):
    on_ranks(2, f"{RANKS}:equals_reference", {"value_gate": gate})


def test_zero_gate_equals_transformer(on_ranks):
    on_ranks(1, f"{RANKS}:zero_gate_is_transformer")


def test_gate_init_std(on_ranks):
    on_ranks(1, f"{RANKS}:gate_init_std", 0.5)


def test_gate_bias_moves_alone(on_ranks):
    on_ranks(1, f"{RANKS}:gate_bias_alone")


@pytest.mark.parametrize(
    ("gate", "told"),
    [
        ("relu", "would never open. Use --value-gate tanh or identity"),
        ("sigmoid", "starts open. Only tanh and identity start at 0 and learn."),
        ("tanh", None),
        ("identity", None),
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
