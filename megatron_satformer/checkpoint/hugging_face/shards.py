"""Writes safetensors files one tensor at a time, in any order: no model is ever whole in memory.

Sizes come from shapes alone, so every tensor's place is known before the first is written. The
files are byte for byte those that the package safetensors writes of the same tensors.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_satformer.checkpoint.dtypes import CODE_OF
from megatron_satformer.checkpoint.hugging_face.weights import INDEX

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_shard_size(size: str) -> int:
    """Returns the bytes that a size such as "5GB" or "500 MB" names.

    Raises:
        ValueError: If it names none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)\s*", size, re.IGNORECASE)
    number = int(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if number < 1:
        raise ValueError(
            f"max_shard_size ({size}) must be a number above 0 and KB, MB, GB or TB, such as 5GB."
        )
    return number


class ShardWriter:
    """The safetensors files of one model, and their index if there are several.

    Args:
        tensors: Name -> tensor on the meta device, for shape and dtype.
        folder: Where the files are made; it must exist.
        max_shard_size: Bytes of tensors in one file, at most; a larger tensor gets its own.

    Attributes:
        bytes: Of all tensors together.
    """

    def __init__(self, tensors: Mapping[str, Tensor], folder: Path, max_shard_size: int) -> None:
        from huggingface_hub import split_torch_state_dict_into_shards

        self._split = split_torch_state_dict_into_shards(
            dict(tensors), max_shard_size=max_shard_size
        )
        self._tensors = tensors
        self._folder = folder
        self._places: dict[str, tuple[Path, int]] = {}  # file, offset
        self.bytes: int = sum(tensor.nbytes for tensor in tensors.values())

    def write_all(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Makes the files and writes every tensor, of the shape and dtype announced, once."""
        self._create()
        for key, tensor in tensors:
            self._write(key, tensor)
        assert not self._places, f"never written: {', '.join(self._places)}"
        if not self._split.is_sharded:
            return
        index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self._folder / INDEX).write_text(text, encoding="utf-8")

    def _create(self) -> None:
        """Makes the files at their full size, with headers and without content."""
        for name, keys in self._split.filename_to_tensors.items():
            # as safetensors does: widest numbers first, so that all are aligned
            keys = sorted(keys, key=lambda key: (-self._tensors[key].itemsize, key))
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            end = 0
            for key in keys:
                tensor = self._tensors[key]
                header[key] = {
                    "dtype": CODE_OF[tensor.dtype],
                    "shape": list(tensor.shape),
                    "data_offsets": [end, end + tensor.nbytes],
                }
                end += tensor.nbytes
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            file, start = self._folder / name, 8 + len(text)
            with file.open("xb") as stream:
                stream.write(len(text).to_bytes(8, "little") + text)
                stream.truncate(start + end)
            for key in keys:
                self._places[key] = file, start + header[key]["data_offsets"][0]

    def _write(self, key: str, tensor: Tensor) -> None:
        (file, offset), announced = self._places.pop(key), self._tensors[key]
        assert (tensor.shape, tensor.dtype) == (announced.shape, announced.dtype), key
        with file.open("r+b") as stream:
            stream.seek(offset)
            stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
