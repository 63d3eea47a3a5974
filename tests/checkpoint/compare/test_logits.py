"""Megatron's own modules run a checkpoint on one process, and two models are held together."""

import json
import os
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import AutoModelForCausalLM

from megatron_satformer.checkpoint.compare.logits import compare_models, verify_export
from megatron_satformer.checkpoint.compare.sample_tokens import (
    VERIFY_TEXT,
    encode_text,
    read_text,
)
from megatron_satformer.checkpoint.convert.to_hf import export_to_hf
from megatron_satformer.checkpoint.megatron.model import load_megatron_model, megatron_logits
from megatron_satformer.checkpoint.megatron.reader import open_checkpoint
from megatron_satformer.model.architectures import PLAIN
from tests.checkpoint import checkpoints
from tests.checkpoint.convert.cases import build_cases, stacked
from tests.checkpoint.inputs import read_ids

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
# rounding of two programs that add up in different orders, at logits of about 10
TOLERANCE = 1e-5
SHORT = {"sequences": 2, "seq_length": 48}
MODELS = build_cases(
    {},
    {"qk_norm": False, "attention_bias": True, "rms_norm_eps": 0.1},
    {"num_key_value_heads": 4, "tie_word_embeddings": False, "rope_theta": 50.0},
    {"value_residual_last_k": 1},
    {"num_key_value_heads": 4, "value_residual_last_k": 2, "rope_theta": 50.0},
    {"value_gate": "softmax_sigmoid", "rms_norm_eps": 0.1},
    {"value_gate": "tanh", "value_gate_bias": True, "tie_word_embeddings": False},
    {"value_gate": "lerp_channels"},
    {"value_gate": "constant"},
    {"value_gate": "softplus", "value_gate_offset": 1.0},
    {"resformer_form": "learnable"},
    {"resformer_form": "sparse", "value_residual_last_k": 2},
    {"depth_attention_stride": 1},
    {"mean_scale": 0.5},
)


@pytest.mark.parametrize(("architecture", "options"), MODELS)
def test_megatron_computes_the_equation(architecture, options, tmp_path):
    """Against the plain torch twin; padding rows are NaN in the file and in no logit."""
    reference = checkpoints.build_reference(architecture=architecture, **options)
    checkpoints.write_checkpoint(tmp_path, reference, stacked=stacked(architecture))
    compare_with_twin(reference, tmp_path)


def test_layers_that_are_alike_may_lie_apart(tmp_path):
    """As Megatron saves them where it is told that they differ."""
    reference = checkpoints.build_reference(architecture=PLAIN, qk_norm=False, attention_bias=True)
    checkpoints.write_checkpoint(tmp_path, reference, stacked=False)
    compare_with_twin(reference, tmp_path)


def compare_with_twin(reference, folder: Path) -> None:
    ids = torch.randint(60, (2, 33))
    before = torch.cuda.is_available(), torch.cuda.current_device, dict(os.environ)
    with load_megatron_model(open_checkpoint(folder)) as model:
        assert isinstance(model, GPTModel)
        logits = megatron_logits(model, ids, 60)
    assert logits.shape == (2, 33, 60)
    expected = reference(ids).logits
    largest = expected.abs().max().item()
    assert largest > 1
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE * largest)
    # transformers runs in the same process afterwards
    assert before == (torch.cuda.is_available(), torch.cuda.current_device, dict(os.environ))
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope="module")
def trained(on_ranks, data_flags, tmp_path_factory):
    """Folder of a checkpoint trained in PP2 x 2 virtual stages, ids, logits of its evaluation."""
    folder = tmp_path_factory.mktemp("trained")
    data = Path(data_flags[data_flags.index("--data-path") + 1])
    ids = read_ids(data)
    torch.save(ids, folder / "ids")
    flags = (
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--group-query-attention --num-query-groups 2 --value-gate softmax --value-gate-bias"
    )
    saving = [*data_flags, "--save", str(folder / "ckpt"), *flags.split()]
    where = str(folder / "ids"), str(folder / "logits")
    on_ranks(2, "tests.checkpoint.ranks:train", saving, *where)
    return folder, ids, torch.load(f"{where[1]}.1")  # of the last stage


def test_trained_in_stages(trained):
    """The whole model on one process gives what the pipeline gave."""
    folder, ids, expected = trained
    with load_megatron_model(open_checkpoint(folder / "ckpt")) as model:
        torch.testing.assert_close(megatron_logits(model, ids), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_export_is_verified_on_its_validation_data(trained, tmp_path, dtype):
    folder, _, _ = trained
    export_to_hf(folder / "ckpt", tmp_path / "hf", dtype=dtype)
    checkpoint = open_checkpoint(folder / "ckpt")
    found = verify_export(checkpoint, tmp_path / "hf")
    assert found.source == "validation data corpus_text_document"
    assert (found.tokens, found.dtype) == (4 * 24, "fp32")
    assert found.within(TOLERANCE)
    assert found.max_difference > 0, "the same program on both sides proves nothing"
    assert found.argmax_agreement == 1
    # without the data, a text; and the weights of the file do count
    checkpoint.args.data_path = ["/nowhere"]
    text = verify_export(checkpoint, tmp_path / "hf")
    assert (text.source, text.within(TOLERANCE)) == ("Shakespeare's sonnets", True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    with torch.no_grad():
        model.model.layers[2].self_attn.value_gate.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "hf")
    assert not verify_export(checkpoint, tmp_path / "hf").within(1e-4)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint of steps 10 and 20, which differ, and the export of the last."""
    folder = tmp_path_factory.mktemp("written")
    for step, gate in ((10, "relu"), (20, "tanh")):
        model = checkpoints.build_reference(value_gate=gate)
        checkpoints.write_checkpoint(folder / "ckpt", model, step=step)
    export_to_hf(folder / "ckpt", folder / "hf")
    return folder


def test_compare(written):
    a, b = written / "ckpt", written / "hf"
    same = compare_models(a, b, **SHORT)
    assert same.within(TOLERANCE)
    assert same.argmax_agreement == 1
    assert same.min_cosine == pytest.approx(1)
    assert (same.tokens, same.vocab_size) == (96, 60)
    assert same.mean_difference < same.max_difference < same.largest_logit
    assert compare_models(b, a, **SHORT).max_difference == same.max_difference
    other = compare_models(a, a / "iter_0000010", **SHORT)
    assert not other.within(1e-4)
    assert other.min_cosine < other.mean_cosine < 0.9999
    assert f"max difference   {other.max_difference:.3e}" in str(other)
    assert json.loads(other.to_json())["max_difference"] == other.max_difference
    again = compare_models(a, a / "iter_0000010", seed=7, **SHORT)
    assert again.max_difference != other.max_difference
    assert not compare_models(a, b, dtype="bf16", **SHORT).within(1e-6)


@pytest.mark.parametrize(("qk_norm", "kind"), [(True, "qwen3"), (False, "llama")])
def test_stock_classes(tmp_path, qk_norm, kind):
    """A plain Transformer, stacked in the checkpoint, against transformers' own class."""
    model = checkpoints.build_reference(architecture="transformer", qk_norm=qk_norm)
    load = checkpoints.write_checkpoint(tmp_path / "ckpt", model, stacked=True)
    export_to_hf(load, tmp_path / "hf")
    found = compare_models(load, tmp_path / "hf", **SHORT)
    assert found.b.endswith(f"(Hugging Face, {kind})")
    assert found.within(TOLERANCE)


def test_text_is_read_as_the_models_read_it(written, tmp_path):
    text = tmp_path / "ids.txt"
    text.write_text(" ".join(str(n % 59) for n in range(96)))
    found = compare_models(written / "ckpt", written / "hf", text=text, **SHORT)
    assert found.source == f"text {text}"
    assert found.within(TOLERANCE)
    text.write_text(" ".join(["1", "60"] * 48))
    with pytest.raises(ValueError, match="token id"):
        compare_models(written / "ckpt", written / "hf", text=text, **SHORT)
    text.write_text("1 2 3")
    with pytest.raises(ValueError, match="has 3 tokens, and 2 x 48 are wanted"):
        compare_models(written / "ckpt", written / "hf", text=text, **SHORT)
    with pytest.raises(ValueError, match="Leave --text out"):
        compare_models(written / "hf", written / "hf", text=text, **SHORT)
    short = encode_text("1 2 3 4 5", "five", lambda t: map(int, t.split()), 4, 2, fewer=True)
    assert short.ids.tolist() == [[1, 2], [3, 4]]


def test_nan_is_never_within(written, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(written / "hf", trust_remote_code=True)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "hf")
    found = compare_models(written / "ckpt", tmp_path / "hf", **SHORT)
    assert not found.within(float("inf"))
    assert json.loads(found.to_json())["max_difference"] is None
    assert "not finite" in str(found)
    assert not compare_models(tmp_path / "hf", tmp_path / "hf", **SHORT).within(1e9)


def test_as_long_as_the_models(written):
    found = compare_models(written / "ckpt", written / "ckpt", sequences=1)
    assert (found.sequences, found.seq_length, found.max_difference) == (1, 64, 0)


def test_refused(written, tmp_path):
    ckpt = written / "ckpt"
    with pytest.raises(ValueError, match=r"seq_length \(256\) must be at most 64.*--seq-length 64"):
        compare_models(ckpt, ckpt, seq_length=256)
    with pytest.raises(
        ValueError, match=r"B .* must be a Megatron checkpoint .* or a Hugging Face"
    ):
        compare_models(ckpt, tmp_path / "nothing", **SHORT)
    small = checkpoints.build_reference()
    checkpoints.write_checkpoint(tmp_path / "small", small, vocab_size=50)
    with pytest.raises(ValueError, match=r"same size, and they are 60 in .*, 50 in"):
        compare_models(ckpt, tmp_path / "small", **SHORT)
    for option, value in (("mtp_num_layers", 1), ("position_embedding_type", "yarn")):
        folder = checkpoints.write_checkpoint(tmp_path / option, small, **{option: value})
        with pytest.raises(NotImplementedError, match=rf"{option} \({value}\)"):
            compare_models(ckpt, folder, **SHORT)
    gone, new = "decoder.layers.1.mlp.linear_fc2.weight", "decoder.layers.1.mlp.linear_fc2.bias"
    folder = checkpoints.write_checkpoint(
        tmp_path / "gone", small, drop=gone, extra={new: torch.zeros(24)}
    )
    with pytest.raises(ValueError, match=f"{gone} is missing; {new} is not known"):
        compare_models(folder, ckpt, **SHORT)


def test_weights_are_never_made_up(written, tmp_path):
    """transformers only warns of a missing weight, and takes a random one."""
    model = AutoModelForCausalLM.from_pretrained(written / "hf", trust_remote_code=True)
    state = model.state_dict()
    del state["model.layers.1.self_attn.value_gate.weight"]
    model.save_pretrained(tmp_path / "hf", state_dict=state)
    with pytest.raises(ValueError, match=r"missing: model.layers.1.self_attn.value_gate.weight"):
        compare_models(written / "ckpt", tmp_path / "hf", **SHORT)


def test_text_of_the_package():
    text = read_text(VERIFY_TEXT)
    assert len(text) > 6000, "1024 tokens of a large vocabulary"
    assert text.isascii()
