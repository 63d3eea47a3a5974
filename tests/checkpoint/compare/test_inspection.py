"""inspect: what lies in a folder of either kind, without reading a weight."""

import json
from pathlib import Path

import pytest

from megatron_satformer.checkpoint.compare.inspection import inspect_checkpoint
from megatron_satformer.checkpoint.convert.to_hf import export_to_hf
from megatron_satformer.model.architectures import PLAIN, TABLE, find_architecture
from tests.checkpoint import checkpoints
from tests.models import build_exported_config

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def written(tmp_path):
    """A checkpoint of steps 10 and 20: 3 layers, 2 with gates of 2 x 24."""
    for step in (10, 20):
        folder = checkpoints.write_checkpoint(
            tmp_path / "ckpt",
            checkpoints.build_reference(value_residual_last_k=1),
            step=step,
            tensor_model_parallel_size=2,
            sequence_parallel=False,
            some_flag={"a": Path("b")},
        )
    return folder


def test_megatron(written):
    report = inspect_checkpoint(written)
    assert (report.step, report.steps, report.problems) == (20, [10, 20], [])
    assert report.tokens == 160 * 64
    assert report.parameters["embedding"] == 128 * 24
    assert report.parameters["own"] == 2 * 24
    assert report.options["layout"] == {"tensor_model_parallel_size": 2}
    assert report.tensors["embedding.word_embeddings.weight"].shape == (128, 24)
    text = str(report)
    assert "step 20, 10,240 tokens (also there: 10)" in text
    assert "value_residual_last_k 1" in text
    assert "value_gate relu" in text
    assert "48 that a plain Transformer has not" in text
    norm = "decoder.layers.0-2.mlp.linear_fc1.layer_norm_weight"
    assert next(line for line in text.splitlines() if norm in line).endswith("[24] fp32 x 3")
    gate = "decoder.layers.2.self_attention.value_gate.weight"
    assert next(line for line in text.splitlines() if gate in line).endswith("[2, 24] fp32")
    assert "optimizer.state" not in text
    assert len(text.splitlines()) < 40
    assert max(map(len, text.splitlines())) < 160
    assert str(inspect_checkpoint(written, 10)).count("step 10,") == 1


@pytest.mark.parametrize("architecture", TABLE)
def test_what_an_architecture_adds(architecture, tmp_path):
    """Its parameters and its options, in either kind of folder."""
    record = find_architecture(architecture)
    twin = checkpoints.build_reference(architecture=architecture, attention_bias=True)
    plain = checkpoints.build_reference(architecture=PLAIN, attention_bias=True)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (twin, plain)]
    load = checkpoints.write_checkpoint(tmp_path / "ckpt", twin, stacked=record.config.layers_alike)
    export_to_hf(load, tmp_path / "hf")
    reports = [inspect_checkpoint(tmp_path / name) for name in ("ckpt", "hf")]
    own = record.all_tensors(build_exported_config(twin.config))
    tables = sum(tensor.shape[1] for _, tensor in own if tensor.packing == "vocabulary")
    padding = (checkpoints.PADDED - checkpoints.VOCABULARY) * tables
    added = sizes[0] - sizes[1]
    assert [report.parameters["own"] for report in reports] == [added + padding, added]
    shown = {n: getattr(twin.config, n) for n in record.model_options}
    shown = {name: value for name, value in shown.items() if value not in (None, False)}
    shown["architecture"] = architecture
    for report in reports:
        model = report.options["model"]
        assert model == model | shown
        said = {name: "yes" if value is True else value for name, value in shown.items()}
        assert all(f"{name} {value}" in str(report) for name, value in said.items())


def test_sizes_on_disk_add_up(written):
    report = inspect_checkpoint(written)
    model, total = 4 * report.parameters["total"], report.bytes["total"]
    assert model < report.bytes["model"] < 2 * model + 40_000, "numbers and a header for each"
    assert report.bytes["optimizer"] == pytest.approx(report.bytes["model"], rel=0.1)
    assert total == sum(f.stat().st_size for f in (written / "iter_0000020").iterdir())
    assert total == sum(report.bytes[part] for part in ("model", "optimizer", "other"))


def test_json_holds_everything(written):
    content = json.loads(inspect_checkpoint(written).to_json())
    assert content["all_options"]["some_flag"] == {"a": "b"}
    assert content["all_options"]["num_layers"] == 3
    stored = content["tensors"]["decoder.final_layernorm.weight"]
    assert stored == {"shape": [24], "dtype": "fp32"}
    assert content["parameters"]["own"] == 48


def test_damage_is_named(written):
    folder = written / "iter_0000020"
    (file,) = folder.glob("*.distcp")
    content = file.read_bytes()
    # the last piece may be of the optimizer: it is named all the same
    file.write_bytes(content[:-1])
    (problem,) = inspect_checkpoint(written).problems
    assert f"{file} is cut short: {len(content) - 1} bytes" in problem
    file.unlink()  # the only one: it holds the args too
    with pytest.raises(ValueError, match=rf"cannot be read.*{file.name}"):
        inspect_checkpoint(written)
    file.write_bytes(content)
    metadata = folder / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        inspect_checkpoint(written)
    assert inspect_checkpoint(written, 10).problems == []


def test_hugging_face(written, tmp_path):
    hf = tmp_path / "hf"
    made = export_to_hf(written, hf, dtype="bf16", max_shard_size="8KB")
    report = inspect_checkpoint(hf)
    assert (report.step, report.problems) == (None, [])
    assert report.parameters["total"] == made.parameters
    assert report.parameters["embedding"] == 60 * 24
    assert report.bytes["total"] == made.bytes
    text = str(report)
    assert "model.layers.0-2.self_attn.q_proj.weight" in text
    assert "[24, 24] bf16 x 3" in text
    assert "tokenizer none" in text
    first, *_, last = sorted(hf.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-2])
    first.unlink()
    missing, cut = inspect_checkpoint(hf).problems
    assert missing == f"{first} of its index is missing"
    assert f"{last} is cut short" in cut
    with pytest.raises(ValueError, match="step"):
        inspect_checkpoint(hf, 10)
    with pytest.raises(ValueError, match=r"CKPT .* must be a Megatron checkpoint"):
        inspect_checkpoint(tmp_path)
