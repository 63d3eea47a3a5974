"""The name table: exact both ways, and the interleave spelled out by hand."""

import pytest
import torch

from megatron_satformer.checkpoint.convert.names import (
    convert_to_hf,
    convert_to_megatron,
    iterate_names,
)
from megatron_satformer.checkpoint.exported.configuration_satformer import SATFormerConfig
from megatron_satformer.checkpoint.exported.modeling_satformer import SATFormerForCausalLM

CASES = [
    {"architecture": "transformer", "qk_norm": False},
    {"architecture": "resformer", "value_residual_last_k": 2},
    {"architecture": "satformer", "value_gate_bias": True, "attention_bias": True},
    {"architecture": "satformer", "tie_word_embeddings": False, "num_key_value_heads": 1},
    {"architecture": "satformer", "num_key_value_heads": 4, "value_residual_last_k": 1},
]


def build_config(**options) -> SATFormerConfig:
    shape = {
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
    }
    return SATFormerConfig(**{**shape, **options})


@pytest.mark.parametrize("options", CASES, ids=str)
def test_round_trip_is_exact(options):
    """Every tensor of the exported model, once, and back without a bit of difference."""
    config = build_config(**options)
    model = SATFormerForCausalLM(config)
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    back = {}
    for name in iterate_names(config):
        tensor = convert_to_megatron(name, state, config, padded_vocab_size=64)
        pieces = convert_to_hf(name, tensor, config)
        assert not set(back) & set(pieces)
        back |= pieces
    assert set(back) == set(state)
    for key, tensor in state.items():
        assert torch.equal(back[key], tensor), key
        assert back[key].untyped_storage().nbytes() == back[key].nbytes, key
        assert back[key].is_contiguous(), key


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
