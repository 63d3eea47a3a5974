"""to-hf on checkpoints of known weights: exact, whole or not at all, clear about what is wrong."""

import ctypes
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_satformer.checkpoint.convert.names import iterate_names
from megatron_satformer.checkpoint.convert.to_hf import export_to_hf
from megatron_satformer.checkpoint.hugging_face.code import model_class
from megatron_satformer.checkpoint.megatron.reader import open_checkpoint
from megatron_satformer.model.architectures import TABLE, all_architectures, find_architecture
from tests.checkpoint import checkpoints
from tests.checkpoint.convert.cases import OWN, build_cases, stacked
from tests.checkpoint.hugging_face.test_tokenizer import write_model

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
# with biases a plain Transformer is neither a Llama nor a Qwen3; test_plain_classes.py has those
CASES = [
    *build_cases(
        {"attention_bias": True, "qk_norm": False},
        {"attention_bias": True, "tie_word_embeddings": False, "rope_theta": 5e5},
        {"value_residual_last_k": 1},
        {"value_residual_last_k": 2, "num_key_value_heads": 4, "rope_theta": 5e5},
        {"value_gate": "tanh", "value_gate_bias": True, "tie_word_embeddings": False},
        {"mean_scale": 0.5},
    ),
    *(pytest.param(a.name, {}, id=a.name) for a in all_architectures() if not a.stock),
]


@pytest.fixture(scope="module")
def load(tmp_path_factory) -> Path:
    """A small SATFormer's checkpoint, for reading only."""
    return checkpoints.write_checkpoint(
        tmp_path_factory.mktemp("ckpt"),
        checkpoints.build_reference(),
        data_path=["0.3", "/data/books_text_document", "0.9", "/data/code_text_document"],
    )


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_exact(architecture, options, tmp_path):
    model = checkpoints.build_reference(architecture=architecture, **options)
    load = checkpoints.write_checkpoint(tmp_path / "ckpt", model, stacked=stacked(architecture))
    made = export_to_hf(load, tmp_path / "hf")
    expected_class = model_class(architecture)
    exported = expected_class.from_pretrained(tmp_path / "hf").eval()
    state = model.state_dict()
    assert set(state) == set(exported.state_dict())
    for key, tensor in exported.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    ids = torch.randint(60, (2, 17))
    wanted = model(ids).logits
    limit = 1e-5 * wanted.abs().max().item()
    torch.testing.assert_close(exported(ids).logits, wanted, rtol=0, atol=limit)
    assert (made.step, made.dtype) == (20, "fp32")
    assert made.model_class == expected_class.__name__
    assert made.parameters == sum(p.numel() for p in model.parameters())
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert ("lm_head.weight" in file.keys()) == (not model.config.tie_word_embeddings)  # noqa: SIM118
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == [expected_class.__name__]
    assert config["model_type"] == expected_class.config_class.model_type
    stored = config | config["rope_parameters"]
    assert stored == stored | options
    assert OWN & config.keys() == find_architecture(architecture).model_options.keys()
    assert config["auto_map"] == expected_class.build_auto_map()
    assert config["eos_token_id"] == 59
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "20 steps on 10,240 tokens" in card
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("architecture", TABLE)
def test_dtype_and_shards(architecture, dtype, tmp_path):
    model = checkpoints.build_reference(architecture=architecture, attention_bias=True)
    load = checkpoints.write_checkpoint(tmp_path / "ckpt", model, stacked=stacked(architecture))
    made = export_to_hf(load, tmp_path / "hf", dtype=dtype, max_shard_size="8KB")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    exported = model_class(architecture).from_pretrained(tmp_path / "hf", dtype="auto")
    wide = {part for name in iterate_names(exported.config) if name.fp32 for part in name.hf}
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert exported.dtype == wanted
    tensors = {k: t for name in files for k, t in load_file(tmp_path / "hf" / name).items()}
    for key, tensor in tensors.items():
        assert torch.equal(exported.state_dict()[key], tensor.to(wanted)), key
        kept = torch.float32 if key in wide else wanted
        assert tensor.dtype == kept, key
        assert torch.equal(tensor, model.state_dict()[key].to(kept)), key
    stored = sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_size"] == stored
    card = (tmp_path / "hf" / "README.md").read_text()
    assert ("the folder holds in float32" in card) == bool(wide)
    for name in files:  # our writer's bytes are the library's
        again = tmp_path / "again"
        save_file(load_file(tmp_path / "hf" / name), again, metadata={"format": "pt"})
        assert (tmp_path / "hf" / name).read_bytes() == again.read_bytes()
    assert made.bytes > stored
    assert {oct(f.stat().st_mode & 0o044) for f in (tmp_path / "hf").iterdir()} == {"0o44"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_shard_size": "5"}, r"max_shard_size \(5\) must be a number above 0"),
        ({"max_shard_size": "0GB"}, r"max_shard_size \(0GB\)"),
        ({"dtype": "fp8"}, r"dtype \(fp8\) must be one of bf16, fp16, fp32"),
        ({"tokenizer": "gone"}, r"tokenizer \(gone\) does not exist"),
        ({"step": 3}, r"step \(3\) must be one of those"),
    ],
)
def test_bad_options(given, words, load, tmp_path):
    with pytest.raises(ValueError, match=words):
        export_to_hf(load, tmp_path / "hf", **given)
    assert not any(tmp_path.iterdir())


def test_without_the_tokenizer_padding_is_unknown_and_kept(tmp_path):
    flags = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "gone.model"}
    model = checkpoints.build_reference()
    load = checkpoints.write_checkpoint(tmp_path / "ckpt", model, **flags)
    made = export_to_hf(load, tmp_path / "hf", tokenizer="none")
    config = json.loads((made.folder / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (checkpoints.PADDED, None)
    flags["tokenizer_model"] = str(write_model(tmp_path / "a.model"))
    load = checkpoints.write_checkpoint(tmp_path / "other", model, **flags)
    with pytest.raises(ValueError, match="has 400 entries, the checkpoint's embedding only 128"):
        export_to_hf(load, tmp_path / "none")


def test_a_weight_too_large_for_fp16(tmp_path):
    model = checkpoints.build_reference()
    with torch.no_grad():
        model.model.norm.weight[3] = 7e4
    load = checkpoints.write_checkpoint(tmp_path / "ckpt", model)
    with pytest.raises(ValueError, match=r"dtype \(fp16\) must hold .*model.norm.weight.*bf16"):
        export_to_hf(load, tmp_path / "hf", dtype="fp16")
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalization": "LayerNorm"}, r"normalization \(LayerNorm\) must be RMSNorm"),
        ({"swiglu": False}, "swiglu"),
        ({"add_bias_linear": True}, "add_bias_linear"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type"),
        ({"rotary_percent": 0.5}, "rotary_percent"),
        ({"rotary_interleaved": True}, "rotary_interleaved"),
        ({"use_rope_scaling": True}, "use_rope_scaling"),
        ({"num_experts": 8}, "num_experts"),
        ({"ffn_hidden_size": 48}, r"linear_fc1.weight is \(80, 24\), not \(96, 24\)"),
        ({"architecture": "transformer"}, "value_gate.weight is not known"),
        ({"value_gate_bias": True}, "value_gate.bias is missing"),
        ({"tokenizer_type": "SFTTokenizer"}, "tokenizer_type"),
        ({"vocab_size": 129}, "vocab_size .* has 129 entries, the checkpoint's embedding only 128"),
        ({"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "gone.model"}, "gone"),
    ],
)
def test_refused(changes, words, tmp_path):
    model = checkpoints.build_reference()
    load = checkpoints.write_checkpoint(tmp_path / "ckpt", model, **changes)
    with pytest.raises(ValueError, match=words):
        export_to_hf(load, tmp_path / "hf")
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt"]


def test_missing_and_unknown_keys_are_named(tmp_path):
    model = checkpoints.build_reference()
    gone, new = "decoder.layers.1.mlp.linear_fc2.weight", "decoder.layers.1.mlp.linear_fc2.bias"
    load = checkpoints.write_checkpoint(
        tmp_path / "ckpt", model, drop=gone, extra={new: torch.zeros(24)}
    )
    with pytest.raises(ValueError, match=f"{gone} is missing; {new} is not known"):
        export_to_hf(load, tmp_path / "hf")


def test_layers_in_one_tensor_are_counted_and_padding_is_not(tmp_path):
    model = checkpoints.build_reference(architecture="transformer")
    load = checkpoints.write_checkpoint(tmp_path / "a", model, stacked=True, num_layers=4)
    with pytest.raises(ValueError, match=r"linear_proj.weight is \(3, 24, 24\), not \(4, 24, 24\)"):
        export_to_hf(load, tmp_path / "hf")
    load = checkpoints.write_checkpoint(tmp_path / "b", model, stacked=True, hidden_size=32)
    words = r"embedding.word_embeddings.weight is \(128, 24\), not \(128, 32\)"
    with pytest.raises(ValueError, match=words):
        export_to_hf(load, tmp_path / "hf")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", r"\.distcp"),
        ("a weight cut", r"__0_0\.distcp is cut short"),
        (
            "a weight overwritten",
            r"decoder\.layers\.2\.mlp\.linear_fc2\.weight in .* cannot be read",
        ),
        ("all but a little cut", "iter_0000020"),
        (".metadata cut", r"\.metadata cannot be read .* cut short or damaged"),
        ("metadata.json cut", r"metadata\.json cannot be read .* cut short or damaged"),
    ],
)
def test_damaged_files_are_named(damage, words, load, tmp_path):
    shutil.copytree(load, tmp_path / "ckpt")
    folder = tmp_path / "ckpt" / "iter_0000020"
    (file,) = folder.glob("*.distcp")
    checkpoint = open_checkpoint(load)
    pieces = checkpoint.metadata.storage_data.items()
    pieces = {where.fqn: info for where, info in pieces if where.fqn in checkpoint.tensors}
    key = "decoder.layers.2.mlp.linear_fc2.weight"
    if damage == "missing":
        file.unlink()
    elif damage == "a weight overwritten":
        with file.open("r+b") as stream:
            stream.seek(pieces[key].offset)
            stream.write(b"\0" * pieces[key].length)
    elif damage.endswith(" cut") and damage != "a weight cut":
        os.truncate(folder / damage.split()[0], 40) if "meta" in damage else os.truncate(file, 100)
    else:
        os.truncate(file, max(i.offset + i.length for i in pieces.values()) - 10)
    with pytest.raises(ValueError, match=words):
        export_to_hf(tmp_path / "ckpt", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_card_names_data_without_their_places(load, tmp_path):
    export_to_hf(load, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "books_text_document (0.25), code_text_document (0.75)" in card
    assert "/data" not in card
    assert "not verified" in card
    assert "AutoTokenizer" not in card, "there is none"


def test_verify(load, tmp_path):
    made = export_to_hf(load, tmp_path / "hf", dtype="bf16", verify=True)
    assert "4 x 64" in made.verified
    assert made.verified in (tmp_path / "hf" / "README.md").read_text()
    assert str(tmp_path) not in made.verified
    model = checkpoints.build_reference(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight *= 1e6  # float32 itself is too coarse then
    wild = checkpoints.write_checkpoint(tmp_path / "wild", model)
    with pytest.raises(ValueError, match=r"not kept: its logits must be within 0\.0001"):
        export_to_hf(wild, tmp_path / "bad", verify=True)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "wild"}


def test_memory_does_not_grow_with_the_model(tmp_path):
    model = checkpoints.build_reference(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=13, num_attention_heads=8
    )
    load = checkpoints.write_checkpoint(tmp_path / "ckpt", model)
    export_to_hf(load, tmp_path / "warm")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_memory()
    made = export_to_hf(load, tmp_path / "hf")
    assert made.bytes > 40e6
    assert peak_memory() - before < made.bytes / 2


def peak_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def test_overwrite(tmp_path):
    load = checkpoints.write_checkpoint(tmp_path / "ckpt", checkpoints.build_reference())
    export_to_hf(load, tmp_path / "hf")
    with pytest.raises(ValueError, match="--overwrite"):
        export_to_hf(load, tmp_path / "hf")
    (tmp_path / "hf" / "stale").touch()
    export_to_hf(load, tmp_path / "hf", dtype="bf16", overwrite=True)
    assert not (tmp_path / "hf" / "stale").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").touch()
    with pytest.raises(ValueError, match="not an earlier output"):
        export_to_hf(load, other, overwrite=True)
    assert (other / "precious").exists()
    bad = checkpoints.write_checkpoint(
        tmp_path / "bad", checkpoints.build_reference(), normalization="LayerNorm"
    )
    with pytest.raises(ValueError, match="normalization"):
        export_to_hf(bad, tmp_path / "hf", overwrite=True)
    assert (tmp_path / "hf" / "model.safetensors").exists()
    assert {f.name for f in tmp_path.iterdir()} == {"ckpt", "hf", "other", "bad"}


USE_ALONE = """
import sys
import torch
torch.set_num_threads(1)
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, model_file, case = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
processor = SentencePieceProcessor(model_file=model_file)
for text in ("To be, or\\n\\nnot  to </s> be", "  x", "", "caf\\u00e9 \\U0001f600"):
    assert tokenizer(text).input_ids == processor.encode(text), text
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
case = torch.load(case)
torch.testing.assert_close(model(case["ids"]).logits, case["logits"], rtol=1e-5, atol=1e-5)
assert model.generation_config.eos_token_id == 2
batch = tokenizer(["the", "and to be is it"], padding=True, return_tensors="pt")
assert batch.attention_mask[0, 0] == 0, "pads on the left"
options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
both = model.generate(**batch, **options)[:, -16:]
alone = model.generate(**tokenizer("the", return_tensors="pt"), **options)[:, -16:]
assert torch.equal(both[:1], alone)
assert not {name.split(".")[0] for name in sys.modules} & {"megatron_satformer", "megatron"}
"""


def test_folder_works_alone(tmp_path):
    """A copy of the folder, a fresh process, no import of this package or of Megatron."""
    spm = write_model(tmp_path / "a.model")
    model = checkpoints.build_reference(vocab_size=400)
    checkpoints.VOCABULARY, checkpoints.PADDED, before = 400, 512, (60, 128)
    try:
        load = checkpoints.write_checkpoint(
            tmp_path / "ckpt",
            model,
            tokenizer_type="SentencePieceTokenizer",
            tokenizer_model=str(spm),
        )
    finally:
        checkpoints.VOCABULARY, checkpoints.PADDED = before
    export_to_hf(load, tmp_path / "hf")
    shutil.move(tmp_path / "hf", tmp_path / "elsewhere")
    ids = torch.randint(400, (2, 17))
    torch.save({"ids": ids, "logits": model(ids).logits.detach()}, tmp_path / "case.pt")
    run = subprocess.run(
        [sys.executable, "-c", USE_ALONE, tmp_path / "elsewhere", spm, tmp_path / "case.pt"],
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    generate = load_tool("generate")
    flags = ["--load", str(tmp_path / "elsewhere"), "--prompt", "the", "--max-new-tokens", "4"]
    code, out, _ = run_tool(generate, [*flags, "--num-samples", "2"])
    assert code == 0
    assert out.count("--- sample") == 2
    assert run_tool(generate, [*flags, "--num-samples", "2"])[1] == out


def load_tool(name: str):
    path = ROOT / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"tool_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(tool, flags: list[str]) -> tuple[int, str, str]:
    """Runs a tool's main here and now, and returns exit code, stdout and stderr."""
    import contextlib
    import io
    import signal

    out, err, argv, handler = io.StringIO(), io.StringIO(), sys.argv, signal.getsignal(15)
    sys.argv = ["tool", *flags]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            tool.run_tool(tool.main)
    except SystemExit as leaving:
        return int(leaving.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.argv = argv
        signal.signal(15, handler)
    return 0, out.getvalue(), err.getvalue()


def test_command_line(tmp_path):
    load = checkpoints.write_checkpoint(tmp_path / "ckpt", checkpoints.build_reference())
    tool = load_tool("convert_checkpoint")
    flags = ["to-hf", "--load", str(load), "--save", str(tmp_path / "hf"), "--dtype", "bf16"]
    code, out, _ = run_tool(tool, flags)
    assert code == 0
    assert "step 20" in out
    assert "bf16" in out
    code, out, err = run_tool(tool, flags)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    code, _, err = run_tool(tool, ["to-hf", "--load", str(load)])
    assert code == 2
    assert err.count("\n") == 1
