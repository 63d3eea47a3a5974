"""Lists the tensors of a Hugging Face folder from its index and headers: no weight is read.

Must not know: what the tensors mean, or how torch's own files are read.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_satformer.checkpoint.dtypes import CODES
from megatron_satformer.checkpoint.tensor_names import list_problems

# in the order in which transformers looks for them
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEX = f"{WEIGHTS[0]}.index.json"


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies and what it is; `code` is safetensors' name of its dtype."""

    file: Path
    shape: tuple[int, ...]
    code: str

    @property
    def dtype(self) -> torch.dtype:
        """Torch's, of a code in CODES."""
        return CODES[self.code]


class Weights(NamedTuple):
    """Files that are there, their tensors by name, and what is missing, cut short or damaged."""

    files: list[Path]
    tensors: dict[str, Stored]
    problems: list[str]  # without a full stop


def list_weights(path: Path, read_torch_file: Callable[[Path], Mapping[str, Stored]]) -> Weights:
    """Lists all that can be, past what is damaged.

    Args:
        path: Of the folder.
        read_torch_file: Lists the tensors of a .bin file; its ValueError becomes a problem.

    Raises:
        ValueError: If the index cannot be read.
    """
    files, index = _find_files(path)
    if not files:
        state = f"there is no {' nor '.join(WEIGHTS)}, nor an index of shards"
        return Weights([], {}, [f"{path} holds no weights: {state}"])
    problems = [f"{file} of its index is missing" for file in files if not file.is_file()]
    files = [file for file in files if file.is_file()]
    tensors: dict[str, Stored] = {}
    for file in files:
        try:
            tensors |= read_torch_file(file) if file.suffix == ".bin" else read_header(file)
        except ValueError as problem:
            problems.append(str(problem).removesuffix("."))
    lost = [n for n, file in index.items() if n not in tensors or tensors[n].file.name != file]
    if lost and not problems:
        places = ", ".join(sorted({index[name] for name in lost}))
        told = f"{list_problems(sorted(lost))} not in {places}"
        problems.append(f"{path} does not fit its index: {told}")
    return Weights(files, tensors, problems)


def _find_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """All that there should be, and of shards the index: tensor -> file."""
    for name in WEIGHTS:
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            return [path / name], {}
        if index.is_file():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not places:
                raise ValueError(
                    f"{index} must hold a weight_map from tensor to file, and it has none."
                )
            return sorted({path / file for file in places.values()}), places
    return [], {}


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: If it is none, or cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object.")
    return content


def read_header(file: Path) -> dict[str, Stored]:
    """Lists the tensors of one safetensors file.

    Raises:
        ValueError: If it is cut short, or no such file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if length <= size else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {k: Stored(file, tuple(t["shape"]), str(t["dtype"])) for k, t in header.items()}
        needed = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(f"{file} is cut short or no safetensors file ({size} bytes).") from None
    if size != needed:
        raise ValueError(f"{file} is cut short or damaged: {size} bytes, not {needed}.")
    return tensors
