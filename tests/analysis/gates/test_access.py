"""What a model shows is what it uses, of every architecture of the table."""

import pytest
import torch

from megatron_satformer.analysis.gates.access import as_packaged, build_grid, changed, watched
from megatron_satformer.checkpoint.exported.modeling_access import LearnedAccess
from megatron_satformer.checkpoint.hugging_face.loading import load_hugging_face_model
from megatron_satformer.model.architectures import all_architectures
from tests.analysis.conftest import SHAPE
from tests.models import build_exported, build_twin, has_tensors

IDS = torch.arange(24).view(2, 12) * 7 % 400
GATES = [
    {},
    {"value_residual_last_k": 2, "value_gate": "tanh"},
    {"value_gate": "lerp_channels"},
    {"value_gate": "constant"},
    {"architecture": "value_embeddings"},
]


def build(**options):
    return build_exported(build_twin(**SHAPE, **options)).eval()


def points_of(model):
    return [module for module in model.modules() if isinstance(module, LearnedAccess)]


def distorted(weights):
    """Not all by one factor, which a norm behind the sum would undo."""
    if isinstance(weights, tuple):
        return tuple((2 + n) * w for n, w in enumerate(weights))
    return weights * (2 + torch.arange(weights.size(-1)))


@pytest.mark.parametrize("architecture", [a.name for a in all_architectures()])
@torch.inference_mode()
def test_what_is_shown_is_used(architecture):
    model = build(architecture=architecture)
    points = points_of(model)
    if not points:
        assert not any(a.name == architecture and has_tensors(a) for a in all_architectures())
        with pytest.raises(ValueError, match=rf"architecture \({architecture}\) must be one whose"):
            build_grid(model, IDS)
        return
    plain = model(IDS).logits
    with changed({point: lambda w: w for point in points}):
        assert torch.equal(model(IDS).logits, plain)
    for point in points:
        with changed({point: distorted}):
            assert not torch.equal(model(IDS).logits, plain)
    assert torch.equal(model(IDS).logits, plain)
    grid = build_grid(model, IDS[:1])
    with watched(grid) as take:
        model(IDS)
        values, _ = take(tuple(IDS.shape))
    assert values.shape == (*IDS.shape, len(grid.rows), len(grid.columns))
    assert (values[:, :, ~grid.present] == 0).all()
    assert (values[:, :, grid.present] != 0).any(1).any(0).float().mean() > 0.8
    assert grid.dynamic == bool((values != values[:1, :1]).any())


@pytest.mark.parametrize("options", GATES, ids=str)
@torch.inference_mode()
def test_gates_are_those_of_the_reference(options):
    twin = build_twin(**SHAPE, **options).eval()
    model = build_exported(twin).eval()
    grid = build_grid(model, IDS[:1])
    with watched(grid) as take:
        model(IDS)
        values, _ = take(tuple(IDS.shape))
    shown = torch.stack(list(twin(IDS).shown), dim=2)
    torch.testing.assert_close(values, shown, atol=1e-6, rtol=1e-5)
    assert grid.gate
    assert grid.rows == [str(layer + 1) for layer in model.config.mixing_layers]
    assert grid.columns == ["1", "2"]
    assert grid.zeros_at_start == (0.0 if options else 0.5)


@torch.inference_mode()
def test_static_weights_have_their_places():
    model = build(architecture="denseformer", dwa_dilation=2)
    grid = build_grid(model, IDS[:1])
    assert (grid.gate, grid.dynamic) == (False, False)
    assert grid.rows == ["1", "2", "3", "4"]
    assert grid.columns == ["X0", "X1", "X2", "X3", "X4"]
    with watched(grid) as take:
        model(IDS)
        values, _ = take(tuple(IDS.shape))
    for n, layer in enumerate(model.model.layers):
        row = dict(zip(grid.columns, values[1, 3, n].tolist(), strict=True))
        expected = dict.fromkeys(grid.columns, 0.0)
        expected |= {
            f"X{j}": weight
            for j, weight in zip(layer.reads, layer.depth_weights.tolist(), strict=True)
        }
        assert row == expected


@torch.inference_mode()
def test_too_many_columns_are_merged_by_source(monkeypatch):
    monkeypatch.setattr("megatron_satformer.analysis.gates.access.MOST_COLUMNS", 8)
    model = build(architecture="muddformer")
    grid = build_grid(model, IDS[:1])
    assert grid.columns == ["X0", "X1", "X2", "X3", "X4"]
    with watched(grid) as take:
        model(IDS)
        values, raw = take(tuple(IDS.shape))
    torch.testing.assert_close(values[:, :, 1, :3], raw[1].abs().mean(2))


def test_the_code_of_a_folder_gives_way_to_the_package(build_folder):
    folder, _ = build_folder()
    code = folder / "modeling_satformer.py"
    text = code.read_text().replace("class LearnedAccess(nn.Identity)", "class Older(nn.Identity)")
    code.write_text(f"{text}\nLearnedAccess = Older\n")
    loaded = load_hugging_face_model(folder, torch.float32)
    model = as_packaged(loaded)
    assert points_of(model)
    assert not points_of(loaded)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, loaded(IDS).logits)


def test_a_model_of_elsewhere_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=1, **sizes))
    with pytest.raises(ValueError, match=r"load \(a LlamaForCausalLM\) must be a model of this"):
        as_packaged(model)
