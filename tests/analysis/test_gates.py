import json
import sys

import numpy as np
import pytest
import torch

from megatron_satformer.analysis import gates
from megatron_satformer.model.architectures import all_architectures
from tests.datasets import write_dataset

TOKENS = np.random.default_rng(0).integers(0, 300, 13 * 8 + 3).astype(np.uint16)


@pytest.mark.parametrize("batch", [1, 5, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"value_residual_last_k": 2, "value_gate": "tanh"},
        *({"architecture": a.name} for a in all_architectures() if a.gates and a.reads_tokens),
    ],
    ids=str,
)
def test_equals_the_reference(build_folder, options, batch):
    folder, reference = build_folder(**options)
    report = gates.measure_gates(folder, TOKENS, seq_length=8, batch=batch)
    ids = torch.from_numpy(TOKENS[: 13 * 8].astype(np.int64)).view(13, 8)
    alphas = reference(ids).shown
    own = [n for n, layer in enumerate(reference.model.layers, 1) if _has_gate(layer.self_attn)]
    assert report.layers == own
    assert report.tokens == ids.numel()
    for mean, zeros, alpha in zip(report.mean, report.zeros, alphas, strict=True):
        assert mean == pytest.approx(alpha.double().mean((0, 1)).tolist(), abs=1e-6)
        assert zeros == (alpha == 0).double().mean((0, 1)).tolist()
    share = np.mean(report.zeros)
    assert 0.2 < share < 0.8 if not options else share == 0  # relu shuts about half at the start


def _has_gate(attention) -> bool:
    return any("gate" in name for name, _ in attention.named_parameters())


def test_reads_no_more_than_it_is_told(build_folder):
    folder, _ = build_folder()
    assert gates.measure_gates(folder, TOKENS, seq_length=8, max_tokens=39).tokens == 32


@pytest.mark.parametrize("architecture", [a.name for a in all_architectures() if a.gates is None])
def test_a_model_without_gates_is_refused(build_folder, architecture):
    folder, _ = build_folder(architecture=architecture)
    told = rf"architecture \({architecture}\) must be one whose layers have gates"
    with pytest.raises(ValueError, match=told):
        gates.measure_gates(folder, TOKENS, seq_length=8)


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokens \(107\) must be at least one sequence \(108\)"):
        gates.measure_gates(tmp_path, TOKENS, seq_length=108)


def test_command(build_folder, tmp_path, monkeypatch, capsys):
    folder, _ = build_folder()
    write_dataset(tmp_path / "data", TOKENS, [27, 40, 40], vocab_size=400)
    argv = ["gates", "--model", folder, "--data-path", tmp_path / "data", "--split", "67,33,0"]
    argv += ["--seq-length", 8, "--output", tmp_path / "gates.json"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    gates.main()
    report = json.loads((tmp_path / "gates.json").read_text())
    assert report["tokens"] == 40  # the third document alone
    assert np.shape(report["mean"]) == np.shape(report["zeros"]) == (3, 2)
    assert "gates of 3 layers on 40 tokens" in capsys.readouterr().out
