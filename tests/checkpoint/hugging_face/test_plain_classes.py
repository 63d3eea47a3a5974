"""A plain Transformer becomes transformers' own Qwen3 or Llama wherever that computes the same."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_satformer.checkpoint.convert.to_hf import export_to_hf
from megatron_satformer.checkpoint.hugging_face.code import config_class
from megatron_satformer.checkpoint.hugging_face.plain_classes import build_stock_config
from megatron_satformer.model.architectures import PLAIN, TABLE
from tests.checkpoint import checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
# head_dim is not hidden_size / heads, there are two queries to a key, eps is nobody's default
CASES = [
    ({"rms_norm_eps": 1e-2}, True, "Qwen3ForCausalLM"),
    ({"tie_word_embeddings": False, "rope_theta": 5e5}, False, "Qwen3ForCausalLM"),
    ({"qk_norm": False, "rms_norm_eps": 1e-2}, False, "LlamaForCausalLM"),
    (
        {"qk_norm": False, "tie_word_embeddings": False, "rope_theta": 5e5, "head_dim": 4},
        True,
        "LlamaForCausalLM",
    ),
]


@pytest.mark.parametrize(("options", "stacked", "name"), CASES, ids=str)
def test_exact(options, stacked, name, tmp_path):
    model = checkpoints.build_reference(architecture="transformer", **options)
    load = checkpoints.write_checkpoint(tmp_path / "ckpt", model, stacked=stacked)
    made = export_to_hf(load, tmp_path / "hf")
    assert made.model_class == name
    assert not list((tmp_path / "hf").glob("*.py"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["architectures"], "auto_map" in config) == ([name], False)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    card = (tmp_path / "hf" / "README.md").read_text()
    assert name in card
    assert "trust_remote_code" not in card
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=False)
    assert type(exported).__name__ == name
    state = model.state_dict()
    assert set(state) == set(exported.state_dict())
    for key, tensor in exported.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    ids = torch.randint(60, (2, 40))
    expected = model(ids).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(exported.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "qwen3"),
        ({"qk_norm_eps": 1e-6}, "qwen3"),
        ({"qk_norm": False}, "llama"),
        ({"qk_norm": False, "qk_norm_eps": 1e-5}, "llama"),
        ({"qk_norm_eps": 1e-5}, None),
        ({"attention_bias": True}, None),
        ({"attention_bias": True, "qk_norm": False}, None),
        # Llama refuses a hidden size that the heads do not divide, Qwen3 takes it
        ({"hidden_size": 26, "qk_norm": False}, None),
        ({"hidden_size": 26}, "qwen3"),
    ],
    ids=str,
)
def test_which(options, kind):
    shape = {**checkpoints.SHAPE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    stock = build_stock_config(config_class(PLAIN)(**{**shape, **options}))
    assert (stock and stock.model_type) == kind


@pytest.mark.parametrize("architecture", [name for name in TABLE if name != PLAIN])
def test_no_other_architecture_is_one_of_theirs(architecture):
    shape = {**checkpoints.SHAPE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert build_stock_config(config_class(architecture)(**shape)) is None


def test_an_eos_that_pads_stays_trainable(tmp_path):
    """Llama's embedding has no gradient for the pad token that config.json names."""
    shape = {**checkpoints.SHAPE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    # untied: the head would give the row a gradient of its own
    shape |= {"tie_word_embeddings": False}
    config = config_class(PLAIN)(**shape, eos_token_id=2, pad_token_id=2)
    model = AutoModelForCausalLM.from_config(build_stock_config(config))
    model(torch.tensor([[5, 2, 7]])).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad[2].abs().sum() > 0
    config.pad_token_id = 3
    assert build_stock_config(config).pad_token_id == 3
