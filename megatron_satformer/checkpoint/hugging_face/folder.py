"""Opens a folder of config.json and weights, Hugging Face's kind, and reads one tensor at a time.

Weights are safetensors (one file, or shards and their index) or torch's pytorch_model.bin. Files
are mapped, not read whole. Must not know: what the tensors mean.
"""

import pickle
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_satformer.checkpoint.dtypes import CODE_OF, CODES
from megatron_satformer.checkpoint.hugging_face.weights import Stored, list_weights, read_json
from megatron_satformer.checkpoint.tensor_names import check_tensor_names, list_problems

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
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
            ValueError: If a number does not fit into `dtype`, or the file is damaged.
        """
        stored = self.tensors[name]
        if stored.file in self._mapped:
            tensor = self._mapped[stored.file][name]
        else:
            try:
                with safe_open(stored.file, framework="pt") as file:
                    tensor = file.get_tensor(name)
            except SafetensorError as error:
                raise ValueError(f"{stored.file} cannot be read: {error}.") from None
        if dtype is None or dtype == tensor.dtype:
            return tensor
        converted = tensor.to(dtype)
        if dtype == torch.float16 and not converted.isfinite().all():
            raise ValueError(
                f"dtype (fp16) must hold {name}, which is too large. Use bf16 or fp32."
            )
        return converted

    def find_dtype(self, embedding: str) -> torch.dtype:
        """What config.json names, else that of the embedding."""
        named = str(self.config.get("dtype") or self.config.get("torch_dtype") or "")
        dtype = getattr(torch, named.removeprefix("torch."), None)
        return dtype if isinstance(dtype, torch.dtype) else self.tensors[embedding].dtype

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
    config = read_json(path / CONFIG)
    mapped: dict[Path, dict[str, Tensor]] = {}

    def read_torch_file(file: Path) -> dict[str, Stored]:
        mapped[file] = _map_torch_file(file)
        return {
            name: Stored(file, tuple(tensor.shape), CODE_OF.get(tensor.dtype, str(tensor.dtype)))
            for name, tensor in mapped[file].items()
        }

    weights = list_weights(path, read_torch_file)
    if weights.problems:
        raise ValueError(f"{list_problems(weights.problems)}.")
    for name, stored in weights.tensors.items():
        if stored.code not in CODES:
            raise ValueError(
                f"{stored.file} holds {name} as {stored.code}, which must be {', '.join(CODES)} to "
                "be converted exactly. Take the model's unquantised folder."
            )
    return HFFolder(path, config, weights.tensors, mapped)


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
    return content
