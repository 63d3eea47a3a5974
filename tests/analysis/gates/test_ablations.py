"""Ablations of models whose gates are set by hand, so that what they do is known."""

import copy

import numpy as np
import pytest
import torch

from megatron_satformer.analysis.gates.ablations import run_ablations
from megatron_satformer.analysis.gates.access import build_grid
from megatron_satformer.analysis.gates.measure import find_baseline, find_losses
from tests.analysis.conftest import SHAPE
from tests.models import build_exported, build_twin

IDS = [torch.arange(96).view(8, 12) * 7 % 400, torch.arange(24).view(2, 12) * 11 % 400]


def ablate(model):
    grid = build_grid(model, IDS[0][:1])
    told = []
    found = run_ablations(model, None, grid, find_baseline(model, grid, IDS), [], 1, told.append)
    assert told[-1] == f"{len(found['changes'])} of {len(found['changes'])} ablations"
    return found["loss"], {(c["kind"], c["row"], c["column"]): c["loss"] for c in found["changes"]}


def loss_of(model):
    return np.concatenate([np.nanmean(find_losses(model, ids), axis=1) for ids in IDS]).mean()


@pytest.mark.parametrize("options", [{}, {"value_gate": "identity", "value_residual_last_k": 2}])
def test_closing_is_the_model_with_these_gates_at_zero(options):
    model = build_exported(build_twin(**SHAPE, **options)).eval()
    base, found = ablate(model)
    assert base == pytest.approx(loss_of(model))
    rows = [str(layer + 1) for layer in model.config.mixing_layers]
    closed = {key for key in found if key[0] == "closed"}
    assert closed == {("closed", None, None)} | {
        ("closed", row, head) for row in rows for head in (None, "1", "2")
    }
    for kind, row, head in sorted(closed, key=str):
        shut = copy.deepcopy(model)
        for layer in model.config.mixing_layers:
            if row in (None, str(layer + 1)):
                weight = shut.model.layers[layer].self_attn.value_gate.weight
                weight.data[slice(None) if head is None else int(head) - 1] = 0
        change = found[kind, row, head]
        assert change["difference"] == pytest.approx(loss_of(shut) - base, abs=1e-6)
        assert change["difference"] != 0
        assert change["low"] <= change["difference"] <= change["high"]
    assert loss_of(model) == pytest.approx(base)  # nothing of it stays


def test_the_mean_of_gates_without_input_changes_nothing():
    model = build_exported(build_twin(**SHAPE, value_gate="constant")).eval()
    _, found = ablate(model)
    assert found["at the mean", None, None]["difference"] == pytest.approx(0, abs=1e-6)
    assert found["closed", None, None]["difference"] != pytest.approx(0, abs=1e-3)


def test_the_mean_is_that_of_tokens():
    twin = build_twin(**SHAPE, value_gate="identity", value_gate_bias=True)
    model = build_exported(twin).eval()
    _, found = ablate(model)
    grid = build_grid(model, IDS[0][:1])
    means = find_baseline(model, grid, IDS).means
    fixed = copy.deepcopy(model)
    for layer, mean in zip(model.config.mixing_layers, means, strict=True):
        gate = fixed.model.layers[layer].self_attn.value_gate
        gate.weight.data.zero_()
        gate.bias.data = mean.flatten()
    difference = found["at the mean", None, None]["difference"]
    assert difference == pytest.approx(loss_of(fixed) - loss_of(model), abs=1e-5)


@pytest.mark.parametrize(
    ("architecture", "kinds"), [("muddformer", {"at the mean"}), ("denseformer", set())]
)
def test_other_weights_are_set_to_their_mean_where_tokens_move_them(architecture, kinds):
    model = build_exported(build_twin(**SHAPE, architecture=architecture)).eval()
    grid = build_grid(model, IDS[0][:1])
    baseline = find_baseline(model, grid, IDS)
    found = run_ablations(model, None, grid, baseline, [], 1, lambda line: None)
    assert {change["kind"] for change in found["changes"]} == kinds
    assert all(change["loss"]["difference"] != 0 for change in found["changes"])
