"""The name table: exact both ways, and the interleave spelled out by hand."""

import pytest
import torch

from megatron_satformer.checkpoint.convert.names import (
    convert_to_hf,
    convert_to_megatron,
    iterate_names,
)
from megatron_satformer.checkpoint.hugging_face.code import (
    config_class,
    model_class,
    model_shapes,
)
from tests.checkpoint.convert.cases import build_cases

CASES = build_cases(
    {"qk_norm": False},
    {"attention_bias": True, "num_key_value_heads": 4},
    {"tie_word_embeddings": False, "num_key_value_heads": 1},
    {"value_residual_last_k": 2},
    {"value_residual_last_k": 1, "num_key_value_heads": 4},
    {"value_gate_bias": True, "attention_bias": True},
)


def build_config(architecture: str = "satformer", **options):
    shape = {
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
    }
    return config_class(architecture)(**{**shape, **options})


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_round_trip_is_exact(architecture, options):
    """Every tensor of the exported model, once, and back without a bit of difference."""
    config = build_config(architecture, **options)
    state = model_class(architecture)(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    for tensor in state.values():
        tensor.normal_()
    back = {}
    for name in iterate_names(config):
        tensor = convert_to_megatron(name, state, config, padded_vocab_size=64)
        rows = 50 if name.packing == "vocabulary" else len(tensor)  # the rest is padding
        assert name.own is None or name.own.shape == (rows, *tensor.shape[1:]), name
        pieces = convert_to_hf(name, tensor, config)
        assert not set(back) & set(pieces)
        back |= pieces
    assert set(back) == set(state)
    for key, tensor in state.items():
        assert torch.equal(back[key], tensor), key
        assert back[key].untyped_storage().nbytes() == back[key].nbytes, key
        assert back[key].is_contiguous(), key


def test_what_stays_float32():
    """ResFormer's lambdas, scalars near 1..L, are too coarse in bf16; gates are not."""
    config = build_config("resformer")
    wide = {part for name in iterate_names(config) if name.fp32 for part in name.hf}
    assert wide == {name for name in model_shapes(config) if "lambda" in name}
    assert len(wide) == 2 + 3
    assert not any(name.fp32 for name in iterate_names(build_config("satformer")))


def test_qkv_interleave():
    """Rows of Megatron's linear_qkv: per KV group its query heads, its key head, its value head."""
    config = build_config()
    (name,) = [n for n in iterate_names(config) if n.layer == 1 and n.packing == "qkv"]
    assert name.megatron == "decoder.layers.1.self_attention.linear_qkv.weight"
    assert name.stacked == "decoder.layers.self_attention.linear_qkv.weight"
    rows = [f"g{g} {h}{d}" for g in range(2) for h in ("q0", "q1", "k", "v") for d in range(6)]
    fused = torch.arange(len(rows), dtype=torch.float32)[:, None].expand(-1, 24).contiguous()
    parts = convert_to_hf(name, fused, config)
    got = {key.split(".")[-2]: [rows[int(i)] for i in part[:, 0]] for key, part in parts.items()}
    assert got == {
        "q_proj": [f"g{g} q{h}{d}" for g in range(2) for h in range(2) for d in range(6)],
        "k_proj": [f"g{g} k{d}" for g in range(2) for d in range(6)],
        "v_proj": [f"g{g} v{d}" for g in range(2) for d in range(6)],
    }


def test_padding_of_the_vocabulary():
    config = build_config()
    name = next(iterate_names(config))
    weight = torch.randn(50, 24)
    padded = convert_to_megatron(name, {"model.embed_tokens.weight": weight}, config, 64)
    assert padded.shape == (64, 24)
    assert torch.equal(padded[:50], weight)
    # zeros would have the logit 0, which is a likely token in a trained model
    assert torch.equal(padded[50:], weight[-1:].expand(14, -1))
