import pytest

from tests.models import build_twin, save_exported

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
        reference = build_twin(**SHAPE, **options, scale=0.0).eval()
        return save_exported(reference, tmp_path / "hf", max_position_embeddings=64), reference

    return build
