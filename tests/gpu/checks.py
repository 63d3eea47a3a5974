"""What the GPU's tests run on a forked rank; each writes what it measured."""

import copy
import json
from pathlib import Path
from typing import Any

import torch

from tests.model import ranks

# Multiples of 16, which Transformer Engine's kernels want.
SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "kv_channels": 16, "ffn_hidden_size": 96}
# Gradients may be off by what rounding does to the twin itself in that format, times this, plus
# this; Transformer Engine's GEMMs round fp32 to tf32, of 10 bits.
TIMES = 3
PLUS = {("local", "float32"): 1e-6, ("transformer_engine", "float32"): 2e-2}
PLUS |= {(impl, "bfloat16"): 1e-2 for impl in ("local", "transformer_engine")}


def equals_twin(architecture: str, impl: str, dtype: str, target: str) -> None:
    """Loss and gradients of one spec against the plain twin's in float64."""
    ranks.start(device="auto")
    wanted = getattr(torch, dtype)
    narrow = {"bf16": True, "params_dtype": wanted} if dtype == "bfloat16" else {}
    shape = SHAPE | {"architecture": architecture}
    model = ranks.build(shape | narrow | {"transformer_impl": impl})
    reference, exported = ranks.build_reference(shape, scale=0.1)
    reference.to(wanted).double()  # what both sides can represent
    ranks.load(model, reference, exported)
    right_loss, right = _twin(copy.deepcopy(reference), exported)
    with torch.autocast("cpu", wanted, enabled=bool(narrow)):
        _, rounded = _twin(reference.float(), exported)
    loss = ranks.mean_loss(model)
    loss.backward()
    gradients = ranks.entries(model, lambda parameter: parameter.grad)
    errors = {
        key: _norm(gradient - right[key][place].to(gradient)) for key, place, gradient in gradients
    }
    norm = _norm(*right.values())
    worst = max(errors, key=lambda key: errors[key] / max(_norm(right[key]), 1e-2 * norm))
    figures = {
        "architecture": architecture,
        "spec": impl,
        "dtype": dtype,
        "loss": abs(loss.item() / right_loss - 1),
        "gradient": torch.tensor([*errors.values()]).norm().item() / norm,
        "gradient of the twin in it": _norm(*(rounded[key] - right[key] for key in right)) / norm,
        "worst tensor": worst,
        "of it": errors[worst] / max(_norm(right[worst]), 1e-2 * norm),
    }
    Path(target).write_text(json.dumps(figures))
    most = TIMES * figures["gradient of the twin in it"] + PLUS[impl, dtype]
    assert max(figures["loss"], figures["gradient"]) <= most, figures
    assert figures["of it"] <= 10 * most, figures


def _twin(model: Any, exported: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The twin's loss, and its gradients by checkpoint key."""
    loss = model(*ranks.tokens()).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.item(), ranks.whole_tensors(gradients, exported)


def _norm(*tensors: torch.Tensor) -> float:
    return torch.stack([tensor.double().norm() for tensor in tensors]).norm().item()
