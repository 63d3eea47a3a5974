"""Files that are missing or cut short, and tensors without pieces, are found from lists alone."""

import os

import pytest
import torch
from torch.distributed.checkpoint import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)

from megatron_satformer.checkpoint.megatron.damage import find_damage

WEIGHT, MOMENT = "decoder.weight", "optimizer.state.exp_avg.decoder.weight"


@pytest.fixture
def metadata(tmp_path):
    """Two files of 100 bytes; the model's piece ends at 60 of the first, its last byte is spare."""
    for name in ("a.distcp", "b.distcp"):
        (tmp_path / name).write_bytes(b"x" * 100)
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([10]))
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([20]), [chunk])
    places = {
        (WEIGHT, 0): _StorageInfo("a.distcp", 20, 40),
        (MOMENT, 0): _StorageInfo("a.distcp", 60, 39),
        (MOMENT, 10): _StorageInfo("b.distcp", 0, 100),
    }
    return Metadata(
        {WEIGHT: tensor, MOMENT: tensor},
        storage_data={MetadataIndex(key, [at]): info for (key, at), info in places.items()},
    )


def test_whole(tmp_path, metadata):
    assert find_damage(tmp_path, metadata) == []
    os.truncate(tmp_path / "a.distcp", 99)
    assert find_damage(tmp_path, metadata) == []


def test_every_damaged_file_is_named_with_what_it_holds(tmp_path, metadata):
    first, second = tmp_path / "a.distcp", tmp_path / "b.distcp"
    os.truncate(first, 98)
    second.unlink()
    assert find_damage(tmp_path, metadata) == [
        f"{first} is cut short: 98 bytes, and part of {MOMENT} ends at 99",
        f"{second} is missing: it holds part of {MOMENT}",
    ]


def test_only_what_is_wanted_counts(tmp_path, metadata):
    first = tmp_path / "a.distcp"
    (tmp_path / "b.distcp").unlink()
    os.truncate(first, 60)
    assert find_damage(tmp_path, metadata, WEIGHT.__eq__) == []
    os.truncate(first, 59)
    assert find_damage(tmp_path, metadata, WEIGHT.__eq__) == [
        f"{first} is cut short: 59 bytes, and part of {WEIGHT} ends at 60"
    ]


def test_a_tensor_without_pieces_and_a_list_without_any(tmp_path, metadata):
    metadata.state_dict_metadata[WEIGHT].chunks.clear()
    assert f"{WEIGHT} has no pieces" in find_damage(tmp_path, metadata)
    metadata.storage_data.clear()
    assert find_damage(tmp_path, metadata) == [f"{tmp_path / '.metadata'} lists no pieces"]
