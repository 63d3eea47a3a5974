"""What every architecture of the table has to keep, one that the package does not know included."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_satformer.model.architectures import TABLE, all_architectures, find_architecture
from tests.models import build_config
from tests.parallel.layouts import some_fast

ROOT = Path(__file__).resolve().parents[3]
RANKS = "tests.model.ranks"
SHAPE = {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 4}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
EVERY = pytest.mark.parametrize("architecture", TABLE)
COMPARED = re.compile(r"architecture[\"')\]]*\s*(?:[=!]=\s*[\"'A-Z]|(?:not )?in [(\[{]\s*[\"'])")
KNOWN = "|".join(TABLE)
LISTED = re.compile(rf"[\[({{][^\])}}]*\"(?:{KNOWN})\",\s*\"(?:{KNOWN})\"")


@EVERY
def test_loss_and_every_gradient_equal_the_twin(on_ranks, architecture):
    on_ranks(1, f"{RANKS}:equals_reference", {"architecture": architecture})


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@EVERY
def test_shared_weights_are_equal_for_one_seed(on_ranks, architecture, ranks):
    on_ranks(ranks, f"{RANKS}:starts_with_shared_weights", {"architecture": architecture})


@EVERY
def test_with_biases_untied_and_without_qk_norm(on_ranks, architecture):
    options = {"architecture": architecture, "add_qkv_bias": True, "qk_layernorm": False}
    on_ranks(1, f"{RANKS}:equals_reference", options, False)


@pytest.mark.parametrize("architecture", some_fast(TABLE))
def test_tensor_parallel_ranks_equal_the_twin(on_ranks, architecture):
    on_ranks(2, f"{RANKS}:equals_reference", {"architecture": architecture})


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [{}, FULL], ids=["plain", "full recompute"])
@EVERY
def test_activations_grow_linearly_with_depth(on_ranks, architecture, recompute):
    on_ranks(1, f"{RANKS}:held_grows_linearly", {"architecture": architecture} | recompute)


@EVERY
def test_layers_are_alike_exactly_without_tensors_of_their_own(architecture):
    config = build_config(architecture, **SHAPE)
    record = find_architecture(architecture)
    own = [[t.shape for t in record.tensors(config, n)] for n in range(1, 5)]
    assert config.layers_alike == all(tensors == own[0] for tensors in own)
    assert config.hetereogenous_dist_checkpoint == (not config.layers_alike)


@EVERY
def test_a_transformers_start(architecture):
    """What starts from zeros says so of the options that it starts with, and can be trained."""
    record = find_architecture(architecture)
    start = build_config(architecture, **SHAPE, **record.start_options)
    assert record.plain_start(start) is None or record.from_transformer is not None


def test_the_readme_has_their_equations():
    readme = (ROOT / "README.md").read_text()
    for name, place in TABLE.items():
        if place.startswith("megatron_satformer."):
            record = find_architecture(name)
            row = f"| `{name}` | {record.equation.splitlines()[0]} | {record.source} |"
            assert row.replace("|  |", "| |") in readme


def test_an_unknown_name_is_told():
    with pytest.raises(ValueError, match=r"architecture \(conformer\) must be one of transformer,"):
        find_architecture("conformer")


def test_options_have_one_meaning():
    """An option that two architectures have has one default in both."""
    defaults: dict[str, set] = {}
    for record in all_architectures():
        for option, default in record.own_options.items():
            defaults.setdefault(option, set()).add(default)
            assert hasattr(build_config(record.name, **SHAPE), option)
    assert all(len(values) == 1 for values in defaults.values())


def test_nothing_else_tells_architectures_apart():
    files = [ROOT / "pretrain_satformer.py", *(ROOT / "tools").glob("*.py")]
    files += [*(ROOT / "megatron_satformer").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    found = []
    for file in files:
        text = file.read_text()
        inside = file.is_relative_to(ROOT / "megatron_satformer/model/architectures")
        if not inside and file != Path(__file__).resolve():
            name = file.relative_to(ROOT)
            found += [f"{name}: {match[0]}" for match in COMPARED.finditer(text)]
            found += [f"{name}: {match[0]}" for match in LISTED.finditer(text)]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        'if config.architecture == "satformer":',
        'architecture != "transformer"',
        'if args.architecture in ("resformer",):',
        'config["architecture"] == PLAIN',
    ],
)
def test_a_comparison_is_found(line):
    assert COMPARED.search(line)


@pytest.mark.parametrize(
    "line", ['("transformer", "satformer")', '["resformer",\n    "satformer"]']
)
def test_a_list_is_found(line):
    assert LISTED.search(line)


def test_coefficients_are_flat_and_tagged():
    from megatron_satformer.model.coefficients import head_coefficients, stream_coefficients

    options = {"use_cpu_initialization": True, "tensor_model_parallel_size": 2}
    for parallel in (False, True):
        config = build_config(**SHAPE, **options, sequence_parallel=parallel)
        stream, head = stream_coefficients(config, [[1.0, 2.0]]), head_coefficients(config, 3)
        assert stream.tolist() == [1.0, 2.0]
        assert stream.sequence_parallel is parallel
        assert head.tolist() == [3.0]
        assert head.average_gradients_across_tp_domain
        assert not hasattr(head, "sequence_parallel")
        assert stream.dtype == head.dtype == torch.float32


@pytest.mark.slow
def test_another_package_cannot_replace_an_architecture(tmp_path):
    metadata = tmp_path / "other-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    group = "[megatron_satformer.architectures]\n"
    (metadata / "entry_points.txt").write_text(f"{group}satformer = other:RECORD\n")
    done = subprocess.run(
        [sys.executable, "-c", "import megatron_satformer.model.architectures"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "ImportError: architecture (satformer) is megatron_satformer." in done.stderr
    assert "other:RECORD. Rename the latter" in done.stderr
