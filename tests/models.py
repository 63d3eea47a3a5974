"""Configurations and plain twins of any architecture of the table, for tests."""

from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_satformer.checkpoint.convert.to_hf import write_config
from megatron_satformer.checkpoint.hugging_face.code import (
    config_class,
    model_class,
)
from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.architectures import find_architecture
from megatron_satformer.model.architectures.record import Carry


def build_config(architecture: str = "satformer", **options: Any) -> DecoderConfig:
    """Megatron's configuration of an architecture."""
    return find_architecture(architecture).config(architecture=architecture, **options)


def twin_class(architecture: str) -> Any:
    """The plain twin's class."""
    return resolve_name(find_architecture(architecture).twin)


def build_twin(
    architecture: str = "satformer", *, seed: int = 0, scale: float = 0.3, **options: Any
) -> Any:
    """The plain twin with random parameters, norms and scalars included."""
    torch.manual_seed(seed)
    twin = twin_class(architecture)
    model = twin(twin.config_class(**options))
    model.config.architecture = architecture
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


def build_exported_config(twin_config: Any, **more: Any) -> Any:
    """The exported configuration of a twin's model."""
    values = dict(vars(twin_config))
    rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    return config_class(twin_config.architecture)(**values, rope_parameters=rope, **more)


def carries(architecture: Any) -> Carry:
    """What crosses the boundaries of a model of four layers beside hidden states, at most."""
    return architecture.carries(_of_four_layers(architecture))


def has_tensors(architecture: Any) -> bool:
    """Whether a model of four layers has tensors beside a Transformer's."""
    return bool(architecture.all_tensors(_of_four_layers(architecture)))


def _of_four_layers(architecture: Any) -> DecoderConfig:
    shape = {"num_layers": 4, "hidden_size": 8, "num_attention_heads": 2}
    return build_config(architecture.name, **shape, pipeline_dtype=None)


def build_exported(twin: Any, **more: Any) -> Any:
    """The exported model of a twin's weights."""
    model = model_class(twin.config.architecture)(build_exported_config(twin.config, **more))
    model.load_state_dict(twin.state_dict())
    return model


def save_exported(twin: Any, folder: Path, **more: Any) -> Path:
    """A folder with the exported model of a twin's weights, as an export has it."""
    config = build_exported_config(twin.config, **more)
    config.architectures = [model_class(config.architecture).__name__]
    config.dtype = torch.float32
    state = {name: tensor.detach().contiguous() for name, tensor in twin.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(config, config, folder)
    return folder
