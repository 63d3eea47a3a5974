"""A plain Transformer becomes transformers' own Qwen3 or Llama wherever that computes the same."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_satformer.checkpoint.convert.from_hf import import_from_hf
from megatron_satformer.checkpoint.convert.to_hf import export_to_hf
from megatron_satformer.checkpoint.hugging_face.code import config_class
from megatron_satformer.checkpoint.hugging_face.plain_classes import STOCK, build_stock_config
from megatron_satformer.model.architectures import PLAIN, TABLE
from tests.checkpoint import checkpoints
from tests.checkpoint.hugging_face.families import FAMILIES
from tests.checkpoint.hugging_face.test_origin import write_folder
from tests.checkpoint.hugging_face.test_tokenizer import byte_level, write_model  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
# head_dim is not hidden_size / heads, there are two queries to a key, eps is nobody's default
CASES = [
    ({"rms_norm_eps": 1e-2}, True, "Qwen3ForCausalLM"),
    ({"tie_word_embeddings": False, "rope_theta": 5e5}, False, "Qwen3ForCausalLM"),
    ({"qk_norm": False, "rms_norm_eps": 1e-2}, False, "LlamaForCausalLM"),
    (
        {"qk_norm": False, "tie_word_embeddings": False, "rope_theta": 5e5, "head_dim": 4},
        True,
        "LlamaForCausalLM",
    ),
]


@pytest.mark.parametrize(("options", "stacked", "name"), CASES, ids=str)
def test_exact(options, stacked, name, tmp_path):
    model = checkpoints.build_reference(architecture="transformer", **options)
    load = checkpoints.write_checkpoint(tmp_path / "ckpt", model, stacked=stacked)
    made = export_to_hf(load, tmp_path / "hf")
    assert made.model_class == name
    assert not list((tmp_path / "hf").glob("*.py"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["architectures"], "auto_map" in config) == ([name], False)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    card = (tmp_path / "hf" / "README.md").read_text()
    assert name in card
    assert "trust_remote_code" not in card
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=False)
    assert type(exported).__name__ == name
    state = model.state_dict()
    assert set(state) == set(exported.state_dict())
    for key, tensor in exported.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    ids = torch.randint(60, (2, 40))
    expected = model(ids).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(exported.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "qwen3"),
        ({"qk_norm_eps": 1e-6}, "qwen3"),
        ({"qk_norm": False}, "llama"),
        ({"qk_norm": False, "qk_norm_eps": 1e-5}, "llama"),
        ({"qk_norm_eps": 1e-5}, None),
        ({"attention_bias": True}, None),
        ({"attention_bias": True, "qk_norm": False}, None),
        # Llama refuses a hidden size that the heads do not divide, Qwen3 takes it
        ({"hidden_size": 26, "qk_norm": False}, None),
        ({"hidden_size": 26}, "qwen3"),
    ],
    ids=str,
)
def test_which(options, kind):
    shape = {**checkpoints.SHAPE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    stock = build_stock_config(config_class(PLAIN)(**{**shape, **options}))
    assert (stock and stock.model_type) == kind


@pytest.mark.parametrize("architecture", [name for name in TABLE if name != PLAIN])
def test_no_other_architecture_is_one_of_theirs(architecture):
    shape = {**checkpoints.SHAPE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert build_stock_config(config_class(architecture)(**shape)) is None


def test_an_eos_that_pads_stays_trainable(tmp_path):
    """Llama's embedding has no gradient for the pad token that config.json names."""
    shape = {**checkpoints.SHAPE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    # untied: the head would give the row a gradient of its own
    shape |= {"tie_word_embeddings": False}
    config = config_class(PLAIN)(**shape, eos_token_id=2, pad_token_id=2)
    model = AutoModelForCausalLM.from_config(build_stock_config(config))
    model(torch.tensor([[5, 2, 7]])).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad[2].abs().sum() > 0
    config.pad_token_id = 3
    assert build_stock_config(config).pad_token_id == 3


TEXTS = ["the of and", "</s> the  that\n<s> it <|endoftext|>", "caf\u00e9 \U0001f600", ""]


def run_both(folder: Path) -> dict:
    """What this process's transformers makes of a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    size, end = model.config.vocab_size, model.generation_config.eos_token_id
    ids = torch.randint(size, (2, 20), generator=torch.Generator().manual_seed(1))
    prompt = tokenizer(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        logits = model(ids).logits
        written = model.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return {
        "class": type(model).__name__,
        "ids": [tokenizer(text).input_ids for text in TEXTS],
        "text": tokenizer.decode(tokenizer(TEXTS[0]).input_ids, skip_special_tokens=True),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "side": tokenizer.padding_side,
        "end": end,
        "dtype": str(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype),
        "logits": logits,
        "written": written.tolist(),
    }


@pytest.fixture
def exports(tmp_path, byte_level) -> list[Path]:  # noqa: F811
    """Stock exports of every class and kind of tokenizer, of runs and of imports."""
    spm = write_model(tmp_path / "a.model")
    trained = {
        "llama": ("SentencePieceTokenizer", spm, {"qk_norm": False, "rope_theta": 5e5}),
        "qwen3": ("HuggingFaceTokenizer", byte_level, {"rope_theta": 2e4, "head_dim": 4}),
        "more_tokens": ("HuggingFaceTokenizer", byte_level, {"qk_norm": False}),
    }
    for name, (kind, file, options) in trained.items():
        model = checkpoints.build_reference(vocab_size=512, architecture="transformer", **options)
        flags = {"tokenizer_type": kind, "tokenizer_model": str(file), "model_vocab_size": 512}
        if name == "more_tokens":
            flags["special_tokens"] = ["<extra>"]
        before = checkpoints.VOCABULARY, checkpoints.PADDED
        checkpoints.VOCABULARY = checkpoints.PADDED = 512
        try:
            load = checkpoints.write_checkpoint(tmp_path / f"{name}.megatron", model, **flags)
        finally:
            checkpoints.VOCABULARY, checkpoints.PADDED = before
        export_to_hf(load, tmp_path / name)
    for number, (config, generation) in enumerate(FAMILIES.values()):
        shutil.copytree(byte_level, tmp_path / f"{number}.hf")
        write_folder(tmp_path / f"{number}.hf", config | {"vocab_size": 384}, generation)
        import_from_hf(tmp_path / f"{number}.hf", tmp_path / f"{number}.megatron", dtype="fp32")
        export_to_hf(tmp_path / f"{number}.megatron", tmp_path / f"family_{number}")
    return [tmp_path / name for name in (*trained, *(f"family_{n}" for n in range(len(FAMILIES))))]


FORMER = os.environ.get("TRANSFORMERS_4")
IN_FORMER = """
import sys, torch, transformers
assert transformers.__version__.startswith("4.57."), transformers.__version__
exec(open(sys.argv[1]).read())
torch.save([run_both(folder) for folder in sys.argv[3:]], sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.skipif(FORMER is None, reason="make test-oldest brings transformers 4.57")
def test_transformers_4_reads_the_same(exports, tmp_path):
    """Ids, text, logits and what is generated: a theta in the wrong place is no error there."""
    source = inspect.getsource(run_both)
    head = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    head += f"from pathlib import Path\nTEXTS = {TEXTS!r}\n"
    (tmp_path / "code.py").write_text(head + source)
    files = map(str, (tmp_path / "code.py", tmp_path / "results", *exports))
    run = subprocess.run(
        [sys.executable, "-c", IN_FORMER, *files],
        env={"PYTHONPATH": FORMER, "PATH": "", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    for folder, theirs in zip(exports, torch.load(tmp_path / "results"), strict=True):
        ours = run_both(folder)
        torch.testing.assert_close(theirs.pop("logits"), ours.pop("logits"), rtol=1e-5, atol=1e-5)
        assert theirs == ours, folder.name
    assert {read["class"] for read in map(run_both, exports)} == {s.name for s in STOCK.values()}


@pytest.mark.slow
def test_exports_tell_nothing_of_this_machine(exports, tmp_path):
    """No path, no option of how a tokenizer was loaded here; a class that transformers 4 has."""
    for folder in exports:
        content = json.loads((folder / "tokenizer_config.json").read_text())
        assert content["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert not {"is_local", "local_files_only", "backend"} & content.keys()
        for file in folder.glob("*.json"):
            assert str(tmp_path) not in file.read_text(), file
            assert not any(name.startswith("_") for name in json.loads(file.read_text())), file
