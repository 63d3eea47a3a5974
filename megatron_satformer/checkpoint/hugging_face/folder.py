"""Opens a folder of config.json and weights, Hugging Face's kind, and reads one tensor at a time.

Weights are safetensors (one file, or shards and their index) or torch's pytorch_model.bin. Files
are mapped, not read whole. Must not know: what the tensors mean.
"""

import json
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_satformer.checkpoint.tensor_names import LISTED, check_tensor_names

CONFIG = "config.json"
# in the order in which transformers looks for them
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# What belongs to a tokenizer, whatever its kind: carried along as it is.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# safetensors' names
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class HFFolder:
    """A folder, opened for reading.

    Attributes:
        path: Of the folder.
        config: Content of config.json.
        tensors: Name -> where it lies.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, Stored]
    _mapped: dict[Path, dict[str, Tensor]] = field(repr=False)  # of torch's files

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Reads one tensor.

        Args:
            name: One of `tensors`.
            dtype: To convert to; None keeps the file's.

        Raises:
            ValueError: If a number does not fit into `dtype`.
        """
        stored = self.tensors[name]
        if stored.file in self._mapped:
            tensor = self._mapped[stored.file][name]
        else:
            with safe_open(stored.file, framework="pt") as file:
                tensor = file.get_tensor(name)
        if dtype is None or dtype == tensor.dtype:
            return tensor
        converted = tensor.to(dtype)
        if dtype == torch.float16 and not converted.isfinite().all():
            raise ValueError(
                f"dtype (fp16) must hold {name}, which is too large. Use bf16 or fp32."
            )
        return converted

    def check(self, expected: Mapping[str, tuple[int, ...]], what: str) -> None:
        """Compares names and shapes with the model's.

        Args:
            expected: Name -> shape, of every tensor that the model has.
            what: The model, in words.

        Raises:
            ValueError: Lists every name that is missing, not known, or of another shape.
        """
        shapes = {name: stored.shape for name, stored in self.tensors.items()}
        check_tensor_names(shapes, expected, f"{self.path} does not hold the tensors of {what}")

    def without(self, *names: str) -> "HFFolder":
        """The folder without some of its tensors, where it has them."""
        kept = {name: stored for name, stored in self.tensors.items() if name not in names}
        return HFFolder(self.path, self.config, kept, self._mapped)

    def without_tied(self, head: str, embedding: str) -> "HFFolder":
        """The folder without the output layer's copy of tied embeddings.

        Raises:
            ValueError: If it is no copy.
        """
        if head not in self.tensors or embedding not in self.tensors:
            return self
        if not torch.equal(self.read(head), self.read(embedding)):
            raise ValueError(
                f"tie_word_embeddings (True) must be false where {head} is not {embedding}, as in "
                f"{self.path}. Mend its {CONFIG}."
            )
        return self.without(head)

    def copy_tokenizer(self, target: Path) -> list[str]:
        """Copies the tokenizer's files as they are and returns their names."""
        names = [name for name in TOKENIZER if (self.path / name).is_file()]
        for name in names:
            shutil.copyfile(self.path / name, target / name)
        return names


def open_hf_folder(path: Path) -> HFFolder:
    """Opens a folder and looks whether every file that it speaks of is there, and whole.

    Raises:
        ValueError: Names what is missing, cut short or not what it should be.
    """
    if not (path / CONFIG).is_file():
        raise ValueError(f"load ({path}) must be a folder with a {CONFIG}, and there is none.")
    config = _read_json(path / CONFIG)
    for name in WEIGHTS:
        index = path / f"{name}.index.json"
        if (path / name).is_file() or index.is_file():
            files = _read_index(index) if not (path / name).is_file() else {}
            names = sorted({path / file for file in files.values()}) or [path / name]
            return _open_files(path, config, names, files)
    raise ValueError(
        f"{path} holds no weights: there is no {' nor '.join(WEIGHTS)}, nor an index of shards."
    )


def _open_files(
    path: Path, config: dict[str, Any], files: list[Path], index: dict[str, str]
) -> HFFolder:
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"{path} is incomplete: {', '.join(absent)} of its index is missing.")
    tensors: dict[str, Stored] = {}
    mapped: dict[Path, dict[str, Tensor]] = {}
    for file in files:
        if file.suffix == ".bin":
            mapped[file] = _map_torch_file(file)
            found = [(k, tuple(t.shape), t.dtype) for k, t in mapped[file].items()]
        else:
            found = list(_read_header(file))
        tensors |= {name: Stored(file, shape, dtype) for name, shape, dtype in found}
    lost = sorted(
        name
        for name, file in index.items()
        if name not in tensors or tensors[name].file.name != file
    )
    if lost:
        raise ValueError(
            f"{path} does not fit its index: {', '.join(lost[:LISTED])} "
            f"not in {', '.join(sorted({index[name] for name in lost}))}."
        )
    return HFFolder(path, config, tensors, mapped)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object.")
    return content


def _read_index(file: Path) -> dict[str, str]:
    names = _read_json(file).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{file} must hold a weight_map from tensor to file, and it has none.")
    return names


def _read_header(file: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                piece = opened.get_slice(name)
                shape = tuple(piece.get_shape())
                yield name, shape, _find_dtype(file, name, piece.get_dtype())
    except SafetensorError as error:
        raise ValueError(f"{file} is cut short or no safetensors file: {error}.") from None


def _find_dtype(file: Path, name: str, code: str) -> torch.dtype:
    if code not in DTYPES:
        raise ValueError(
            f"{file} holds {name} as {code}, which must be {', '.join(DTYPES)} to be converted "
            "exactly. Take the model's unquantised folder."
        )
    return DTYPES[code]


def _map_torch_file(file: Path) -> dict[str, Tensor]:
    if not zipfile.is_zipfile(file):
        raise ValueError(
            f"{file} is cut short, or saved by torch before 1.6. Save it again with torch.save."
        )
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{file} cannot be read: {reason}.") from None
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{file} must hold a model's state dict: tensors by name, nothing else.")
    for name, tensor in content.items():
        if tensor.dtype not in DTYPES.values():
            _find_dtype(file, name, str(tensor.dtype))
    return content
