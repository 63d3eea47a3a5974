"""Folders of weights are opened only where every tensor can be converted exactly."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_satformer.checkpoint.hugging_face.folder import open_hf_folder


def write_folder(path, stored, **config):
    (path / "config.json").write_text(json.dumps(config))
    save_file({"embedding": torch.ones(2, 3, dtype=stored)}, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ({"torch_dtype": "torch.float16"}, torch.float16),
        ({"dtype": "auto"}, torch.bfloat16),
    ],
)
def test_dtype(tmp_path, config, expected):
    folder = open_hf_folder(write_folder(tmp_path, torch.bfloat16, **config))
    assert folder.find_dtype("embedding") == expected


def test_what_cannot_be_converted_exactly_is_refused(tmp_path):
    write_folder(tmp_path, torch.int8)
    with pytest.raises(ValueError, match="holds embedding as I8, which must be BF16, F16, F32"):
        open_hf_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"embedding": torch.ones(2, dtype=torch.float64)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds embedding as torch\.float64, which must be BF16"):
        open_hf_folder(tmp_path)


def test_a_header_that_contradicts_itself_is_one_line(tmp_path):
    file = write_folder(tmp_path, torch.float32) / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":[2,3]', b'"shape":[2,9]'))
    folder = open_hf_folder(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read: "):
        folder.read("embedding")
