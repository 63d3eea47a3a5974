"""What lies in a folder of weights is listed from headers, past what is damaged."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from megatron_satformer.checkpoint.hugging_face.weights import Stored, list_weights, read_header

PARTS = {
    "a.safetensors": {"a": torch.zeros(4, 2, dtype=torch.bfloat16), "b": torch.zeros(())},
    "c.safetensors": {"c": torch.zeros(3, dtype=torch.int64)},
}


@pytest.fixture
def folder(tmp_path):
    for name, tensors in PARTS.items():
        save_file(tensors, tmp_path / name, metadata={"format": "pt"})
    write_index(tmp_path, {"a": "a.safetensors", "b": "a.safetensors", "c": "c.safetensors"})
    return tmp_path


def write_index(folder, places):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))


def no_torch_file(file):
    raise ValueError(f"{file} is torch's.")


def test_shards(folder):
    first, second = folder / "a.safetensors", folder / "c.safetensors"
    found = list_weights(folder, no_torch_file)
    assert (found.files, found.problems) == ([first, second], [])
    assert found.tensors == {
        "a": Stored(first, (4, 2), "BF16"),
        "b": Stored(first, (), "F32"),
        "c": Stored(second, (3,), "I64"),
    }
    assert found.tensors["a"].dtype == torch.bfloat16


def test_a_single_file_comes_before_an_index_and_before_torchs(folder):
    for name in ("model.safetensors", "pytorch_model.bin"):
        save_file({"x": torch.zeros(1)}, folder / name)
    assert list_weights(folder, no_torch_file).tensors.keys() == {"x"}


def test_every_problem_is_listed_beside_what_is_whole(folder):
    first, second = folder / "a.safetensors", folder / "c.safetensors"
    size = first.stat().st_size
    os.truncate(first, size - 1)
    places = {"a": first.name, "c": second.name, "d": "d.bin", "e": "e.safetensors"}
    write_index(folder, places)
    (folder / "d.bin").touch()
    found = list_weights(folder, no_torch_file)
    assert found.tensors.keys() == {"c"}
    assert found.problems == [
        f"{folder / 'e.safetensors'} of its index is missing",
        f"{first} is cut short or damaged: {size - 1} bytes, not {size}",
        f"{folder / 'd.bin'} is torch's",
    ]


def test_an_index_that_does_not_fit(folder):
    write_index(folder, {"a": "c.safetensors", "c": "c.safetensors", "e": "a.safetensors"})
    assert list_weights(folder, no_torch_file).problems == [
        f"{folder} does not fit its index: a; e not in a.safetensors, c.safetensors"
    ]
    write_index(folder, {})
    with pytest.raises(ValueError, match="must hold a weight_map from tensor to file"):
        list_weights(folder, no_torch_file)


def test_no_weights(tmp_path):
    (problem,) = list_weights(tmp_path, no_torch_file).problems
    assert "no model.safetensors nor pytorch_model.bin, nor an index of shards" in problem


HEADER = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x05",
        b"\xff" * 16,
        len(HEADER).to_bytes(8, "little") + HEADER[:-1],
        (2).to_bytes(8, "little") + b"[]",
        (8).to_bytes(8, "little") + b'{"a":{}}',
        (8).to_bytes(8, "little") + b'{"a": 1}',
    ],
)
def test_what_is_no_header_is_named(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    told = rf"model.safetensors is cut short or no safetensors file \({len(content)} bytes\)"
    with pytest.raises(ValueError, match=told):
        read_header(file)


def test_a_file_that_is_too_long_is_named(tmp_path):
    file, start = tmp_path / "model.safetensors", len(HEADER).to_bytes(8, "little") + HEADER
    file.write_bytes(start + bytes(5))
    with pytest.raises(ValueError, match=f"damaged: {len(start) + 5} bytes, not {len(start) + 4}"):
        read_header(file)
