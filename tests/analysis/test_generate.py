"""generate: text from either kind of folder, streamed character by whole character."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_satformer.analysis.generate import (
    Sampling,
    TextStream,
    generate_text,
    load_model,
)
from megatron_satformer.checkpoint.convert.to_hf import export_to_hf

ROOT = Path(__file__).resolve().parents[2]


def load_file(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


checkpoints = load_file(ROOT / "tests/checkpoint/checkpoints.py")
checkpoints.VOCABULARY, checkpoints.PADDED = 400, 512
write_model = load_file(ROOT / "tests/checkpoint/hugging_face/test_tokenizer.py").write_model
tool = load_file(ROOT / "tools" / "generate.py")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
AWKWARD = "na\u00efve \u65e5\u672c\u8a9e \U0001f642\U0001f642 \u0e44\u0e17\u0e22  and\n two \ufb01n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of steps 10 and 20 with a tokenizer, and the export of the last."""
    folder = tmp_path_factory.mktemp("generate")
    model = str(write_model(folder / "spm.model"))
    for step, gate in ((10, "sigmoid"), (20, "tanh")):
        reference = checkpoints.build_reference(vocab_size=400, value_gate=gate)
        checkpoints.write_checkpoint(
            folder / "ckpt",
            reference,
            step=step,
            vocab_size=None,
            tokenizer_type="SentencePieceTokenizer",
            tokenizer_model=model,
        )
    export_to_hf(folder / "ckpt", folder / "hf")
    return folder


def run_tool(capsys, monkeypatch, *flags) -> str:
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags)])
    tool.main()
    return capsys.readouterr().out


def test_either_kind_gives_the_same_text(folders, capsys, monkeypatch):
    flags = "--prompt", "the of and", "--max-new-tokens", 40, "--num-samples", 2
    outputs = [
        run_tool(capsys, monkeypatch, "--load", folders / name, *flags)
        for name in ("ckpt", "hf", "ckpt/iter_0000010")
    ]
    assert outputs[0] == outputs[1] != outputs[2]
    _, first, second = outputs[0].split("--- sample ")
    assert first.startswith("1 of 2\nthe of and")
    assert first.split("\n", 1)[1] != second.split("\n", 1)[1]
    again = run_tool(capsys, monkeypatch, "--load", folders / "ckpt", "--step", 10, *flags)
    assert again == outputs[2]
    other = run_tool(capsys, monkeypatch, "--load", folders / "hf", "--seed", 1235, *flags)
    # each further sample adds 1 to the seed
    assert other.split("--- sample ")[1].split("\n", 1)[1] == second.split("\n", 1)[1]


def test_stream_equals_text(folders):
    model, tokenizer = load_model(folders / "ckpt", dtype="bf16")
    assert model.dtype == torch.bfloat16
    for prompt in ("", "the of"):
        pieces = []
        text = generate_text(
            model, tokenizer, prompt, Sampling(48), streamer=TextStream(tokenizer, pieces.append)
        )
        assert "".join(pieces) == text
        assert len(pieces) > 5
    greedy = [generate_text(model, tokenizer, "a", Sampling(8, temperature=0), n) for n in (0, 1)]
    assert greedy[0] == greedy[1]


def test_characters_are_never_cut(folders):
    """Every character of these is several tokens; words keep the space before them."""
    _, tokenizer = load_model(folders / "hf")
    prompt = tokenizer.encode("the of")
    ids = tokenizer.encode("the of " + AWKWARD)[len(prompt) :]
    assert len(ids) > 40
    pieces = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([prompt]))
    for number in ids:
        stream.put(torch.tensor([number]))
    stream.end()
    assert "".join(pieces) == " " + AWKWARD
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 15, "it did not stream"
    # cut off in the middle of a character: what is there comes out at the end
    pieces.clear()
    stream.put(torch.tensor([prompt]))
    stream.put(torch.tensor(tokenizer.encode("\U0001f642")[-4:-2]))
    assert pieces == []
    stream.end()
    assert "\ufffd" in "".join(pieces)


def test_stock_llama_with_a_first_token(folders, tmp_path):
    """Its tokenizer puts <s> before a prompt, as in its training."""
    _, tokenizer = load_model(folders / "hf")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save_pretrained(tmp_path / "llama")
    model, tokenizer = load_model(tmp_path / "llama")
    seen = []

    class Seen:
        def put(self, value):
            seen.append(value.flatten().tolist())

        def end(self):
            pass

    text = generate_text(model, tokenizer, "the", Sampling(5), streamer=Seen())
    assert seen[0][0] == 1
    assert isinstance(text, str)
    with pytest.raises(ValueError, match=r"max_new_tokens \(40\) must be at most"):
        generate_text(model, tokenizer, "the", Sampling(40))
    with pytest.raises(ValueError, match=r"prompt \(\d+ tokens\) must be shorter than 32"):
        generate_text(model, tokenizer, "the of " * 40, Sampling(1))


def test_refused(folders, tmp_path, capsys, monkeypatch):
    with pytest.raises(ValueError, match=r"load .* must be a Megatron checkpoint"):
        load_model(tmp_path)
    plain = checkpoints.build_reference(vocab_size=400)
    null = checkpoints.write_checkpoint(tmp_path / "null", plain)
    with pytest.raises(ValueError, match=r"tokenizer_type \(NullTokenizer\).*Pass --tokenizer"):
        load_model(null)
    model, tokenizer = load_model(null, tokenizer=str(folders / "spm.model"))
    assert generate_text(model, tokenizer, "a", Sampling(3))
    export_to_hf(null, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"must hold a tokenizer.*Pass --tokenizer"):
        load_model(tmp_path / "hf")
    _, tokenizer = load_model(tmp_path / "hf", tokenizer=str(folders / "spm.model"))
    assert len(tokenizer) == 400
    large = str(write_model(tmp_path / "large.model", vocab_size=700))
    with pytest.raises(ValueError, match="700 entries"):
        load_model(null, tokenizer=large)
    with pytest.raises(ValueError, match="700 entries"):
        load_model(folders / "hf", tokenizer=large)
    with pytest.raises(ValueError, match=r"device \(cuda:77\)"):
        load_model(folders / "hf", device="cuda:77")
    with pytest.raises(ValueError, match="step"):
        load_model(folders / "hf", step=3)
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} .* must be"):
            Sampling(**wrong)
    with pytest.raises(ValueError, match="at most"):
        run_tool(capsys, monkeypatch, "--load", folders / "hf", "--prompt", "the of")
    assert capsys.readouterr().out == "", "refused before anything is printed"
