from dataclasses import asdict

import pytest
import torch

from megatron_satformer.checkpoint.exported.configuration_satformer import SATFormerConfig
from megatron_satformer.checkpoint.exported.modeling_satformer import SATFormerForCausalLM
from megatron_satformer.model.reference.decoder import ReferenceConfig, ReferenceModel

SHAPE = {
    "vocab_size": 400,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}


@pytest.fixture
def build_folder(tmp_path, monkeypatch):
    """Makes an exported folder and the reference model of the same weights."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    def build(**options):
        torch.manual_seed(0)
        reference = ReferenceModel(ReferenceConfig(**SHAPE, **options)).eval()
        values = asdict(reference.config)
        rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
        config = SATFormerConfig(**values, rope_parameters=rope, max_position_embeddings=64)
        model = SATFormerForCausalLM(config)
        model.load_state_dict(reference.state_dict())
        model.save_pretrained(tmp_path / "hf")
        return tmp_path / "hf", reference

    return build
