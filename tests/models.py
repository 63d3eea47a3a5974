"""Configurations and plain twins of any architecture of the table, for tests."""

from pkgutil import resolve_name
from typing import Any

import torch

from megatron_satformer.checkpoint.hugging_face.code import config_class
from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.architectures import find_architecture


def build_config(architecture: str = "satformer", **options: Any) -> DecoderConfig:
    """Megatron's configuration of an architecture."""
    return find_architecture(architecture).config(architecture=architecture, **options)


def build_twin(
    architecture: str = "satformer", *, seed: int = 0, scale: float = 0.3, **options: Any
) -> Any:
    """The plain twin with random parameters, norms and scalars included."""
    torch.manual_seed(seed)
    twin = resolve_name(find_architecture(architecture).twin)
    model = twin(twin.config_class(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


def build_exported_config(architecture: str, twin_config: Any, **more: Any) -> Any:
    """The exported configuration of a twin's model."""
    values = dict(vars(twin_config))
    rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    return config_class(architecture)(**values, rope_parameters=rope, **more)


def carries(architecture: Any) -> bool:
    """Whether anything but hidden states crosses a boundary of a model of four layers."""
    config = build_config(
        architecture.name, num_layers=4, hidden_size=8, num_attention_heads=2, pipeline_dtype=None
    )
    return any(architecture.carries(config))
