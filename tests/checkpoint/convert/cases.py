"""Architectures of the table, each with the options that it is tried with."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_satformer.model.architectures import TABLE, all_architectures, find_architecture

OWN = {name for architecture in all_architectures() for name in architecture.own_options}


def build_cases(*variants: dict[str, Any]) -> list[Any]:
    """Every architecture with every variant whose options it has: (architecture, options)."""
    return [
        pytest.param(name, variant, id=f"{name}-{describe(variant)}")
        for name in TABLE
        for variant in variants
        if OWN.intersection(variant) <= find_architecture(name).own_options.keys()
    ]


def describe(options: dict[str, Any]) -> str:
    """Name of a case."""
    return ", ".join(f"{name} {value}" for name, value in options.items()) or "defaults"


def stacked(architecture: str) -> bool:
    """Whether Megatron saves all layers of a kind in one tensor."""
    return find_architecture(architecture).config.layers_alike


def rewrite_as_before(folder: Path) -> None:
    """Gives config.json the names and the keys of an export with one class for all."""
    content = json.loads((folder / "config.json").read_text())
    files = {"AutoConfig": "configuration_satformer.SATFormerConfig"}
    for auto, name in (("AutoModel", "Model"), ("AutoModelForCausalLM", "ForCausalLM")):
        files[auto] = f"modeling_satformer.SATFormer{name}"
    options = {"value_gate": "relu", "value_gate_bias": False, "value_residual_last_k": None}
    content = options | content | {"model_type": "satformer", "auto_map": files}
    content["architectures"] = ["SATFormerForCausalLM"]
    (folder / "config.json").write_text(json.dumps(content))
