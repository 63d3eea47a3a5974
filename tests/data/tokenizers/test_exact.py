import base64
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_satformer.cli import ToolParser
from megatron_satformer.data.tokenizers.exact import build_tokenizer
from megatron_satformer.data.tokenizers.options import (
    TokenizerOptions,
    add_tokenizer_arguments,
    take_tokenizer_options,
)

END = "<|endoftext|>"
ROOT = Path(__file__).resolve().parents[3]


def megatron_tokenizer(options: TokenizerOptions):
    """Megatron's own, with its parser's defaults for what is not in the options."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer as build

    values = {**vars(options), "metadata_path": None, "chat_template": None}
    if options.special_tokens is not None:
        values["special_tokens"] = list(options.special_tokens)
    return build(SimpleNamespace(**values, pad_vocab_size=False))


def assert_equal(options: TokenizerOptions, texts: list[str]) -> None:
    ours = build_tokenizer(options)
    theirs = megatron_tokenizer(options)
    assert ours.vocab_size == theirs.vocab_size
    assert ours.eod == theirs.eod
    expected = [list(theirs.tokenize(text)) for text in texts]
    assert [list(ours.encode(text)) for text in texts] == expected
    assert ours.encode_batch(texts) == expected


@pytest.mark.parametrize(
    "kind", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"]
)
def test_sentencepiece_equals_megatrons(kind: str, spm_model: str, texts: list[str]) -> None:
    assert_equal(TokenizerOptions(kind, spm_model), texts)


def test_null_equals_megatrons() -> None:
    texts = ["1 2 3", "320", "0 0"]
    assert_equal(TokenizerOptions("NullTokenizer", None, 321), texts)
    assert_equal(TokenizerOptions("NullTokenizer", None, 321, null_tokenizer_eod_id=7), texts)


@pytest.fixture(scope="module")
def hf_folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[END, "<s>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # A template that adds a token: Megatron keeps it, and so must we.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    folder = tmp_path_factory.mktemp("hf")
    tokenizer.save(str(folder / "tokenizer.json"))
    from transformers import PreTrainedTokenizerFast

    file = str(folder / "tokenizer.json")
    # sep, not eos: Megatron takes one for the other.
    PreTrainedTokenizerFast(tokenizer_file=file, sep_token=END).save_pretrained(folder)
    return folder


def test_hugging_face_folder_and_file_equal_megatrons(
    hf_folder: Path, texts: list[str], tmp_path: Path
) -> None:
    assert_equal(TokenizerOptions("HuggingFaceTokenizer", str(hf_folder)), texts)
    alone = tmp_path / "tokenizer.json"
    alone.write_bytes((hf_folder / "tokenizer.json").read_bytes())
    whole = build_tokenizer(TokenizerOptions("HuggingFaceTokenizer", str(hf_folder)))
    beside = str(hf_folder / "tokenizer.json")
    for model, eod in ((str(alone), None), (beside, whole.eod)):
        tokenizer = build_tokenizer(TokenizerOptions("HuggingFaceTokenizer", model))
        assert tokenizer.eod == eod
        assert tokenizer.vocab_size == whole.vocab_size
        assert [tokenizer.encode(text) for text in texts] == [whole.encode(t) for t in texts]


@pytest.mark.parametrize(
    "flags",
    [
        {"special_tokens": ("<extra>", "<s>")},
        {"tokenizer_hf_no_include_special_tokens": True},
        {"tokenizer_hf_no_use_fast": True},
    ],
    ids=str,
)
def test_hugging_face_flags_equal_megatrons(flags: dict, hf_folder: Path, texts: list[str]) -> None:
    odd = [*texts[:40], f"a{END} <extra> b<s>", "<extra>"]
    assert_equal(TokenizerOptions("HuggingFaceTokenizer", str(hf_folder), **flags), odd)


def test_a_tokenizer_with_code_needs_leave(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "code.py").write_text(
        "from transformers import PreTrainedTokenizer\n"
        "class Letters(PreTrainedTokenizer):\n"
        "    vocab_size = 256\n"
        "    def get_vocab(self): return {chr(n): n for n in range(256)}\n"
        "    def _tokenize(self, text): return list(text)\n"
        "    def _convert_token_to_id(self, token): return ord(token)\n"
        "    def _convert_id_to_token(self, index): return chr(index)\n"
    )
    config = {"tokenizer_class": "Letters", "auto_map": {"AutoTokenizer": ["code.Letters", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    options = TokenizerOptions("HuggingFaceTokenizer", str(tmp_path))
    with pytest.raises(ValueError, match="Read it, then pass --trust-remote-code"):
        build_tokenizer(options)
    trusting = TokenizerOptions("HuggingFaceTokenizer", str(tmp_path), trust_remote_code=True)
    assert_equal(trusting, ["abc", ""])


@pytest.fixture(scope="module")
def tik_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    merges = [b"th", b"the", b" t", b" the", b"in", b"\n\n", "\u00e9".encode(), b"12"]
    tokens = [*(bytes([n]) for n in range(256)), *merges]
    rows = [
        {
            "rank": rank,
            "token_bytes": base64.b64encode(token).decode(),
            "token_str": token.decode("latin-1"),
        }
        for rank, token in enumerate(tokens)
    ]
    path = tmp_path_factory.mktemp("tik") / "vocab.json"
    path.write_text(json.dumps(rows))
    return str(path)


SEVEN = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")


@pytest.mark.parametrize(
    "flags",
    [
        {"vocab_size": 1264},
        {"vocab_size": 1260, "tiktoken_pattern": "v1"},
        {
            "vocab_size": 283,
            "tiktoken_pattern": "v2",
            "tiktoken_num_special_tokens": 20,
            "special_tokens": ("[INST]", *SEVEN),
        },
    ],
    ids=str,
)
def test_tiktoken_equals_megatrons(flags: dict, tik_model: str, texts: list[str]) -> None:
    odd = [*texts, "don't DON'T 1234\r\n\r\n  x", "</s>the<SPECIAL_9><SPECIAL_999> [INST]"]
    assert_equal(TokenizerOptions("TikTokenizer", tik_model, **flags), odd)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, r"vocab_size \(131072\) must be at most 1264: .*Pass --vocab-size 1264"),
        ({"special_tokens": ("a",)}, r"special_tokens \(a\) must be different names that include"),
        (
            {"tiktoken_num_special_tokens": 3},
            r"tiktoken_num_special_tokens \(3\) must be at least 7",
        ),
        ({"tokenizer_model": __file__}, "must be a TikToken vocabulary"),
    ],
)
def test_bad_tiktoken_options(flags: dict, message: str, tik_model: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_tokenizer(TokenizerOptions("TikTokenizer", **{"tokenizer_model": tik_model, **flags}))


@pytest.fixture(scope="module")
def gpt2_files(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder called gpt2, which Megatron finds in the working directory, as the hub has it."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder = tmp_path_factory.mktemp("there") / "gpt2"
    folder.mkdir()
    tokenizer.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    return folder


@pytest.mark.parametrize(
    "special_tokens", [None, pytest.param(("<extra>", "<more>"), marks=pytest.mark.slow)]
)
def test_gpt2_equals_megatrons(
    special_tokens: tuple | None, gpt2_files: Path, texts: list[str], monkeypatch
) -> None:
    monkeypatch.chdir(gpt2_files.parent)
    files = {"vocab_file": "gpt2/vocab.json", "merge_file": "gpt2/merges.txt"}
    options = TokenizerOptions("GPT2BPETokenizer", **files, special_tokens=special_tokens)
    assert_equal(options, [*texts, f"a {END}b{END}", " <extra> x<more>"])


def parsed(*flags: str) -> TokenizerOptions:
    parser = ToolParser()
    add_tokenizer_arguments(parser)
    arguments = vars(parser.parse_args([*flags]))
    options = take_tokenizer_options(arguments)
    assert arguments == {}
    return options


def test_every_flag_of_megatrons_parser_is_known() -> None:
    import argparse

    from megatron.training.arguments import _add_tokenizer_args

    theirs = _add_tokenizer_args(argparse.ArgumentParser())
    ours = ToolParser()
    add_tokenizer_arguments(ours)
    known = {flag for action in ours._actions for flag in action.option_strings}
    wanted = {flag for action in theirs._actions for flag in action.option_strings}
    assert wanted <= known
    for name, default in vars(parsed("--tokenizer-type", "NullTokenizer")).items():
        if name != "tokenizer_type":
            assert theirs.get_default(name) == default, name


def test_old_names_and_flags_of_training_are_noted(capsys) -> None:
    gpt2 = parsed("--tokenizer-type", "GPT2BPETokenizer", "--vocab", "v", "--merge-file", "m")
    assert (gpt2.vocab_file, gpt2.merge_file) == ("v", "m")
    assert capsys.readouterr().err == "note: --vocab is the old name of --vocab-file.\n"
    llama = parsed("--tokenizer-type", "Llama2Tokenizer", "--vocab", "m", "--vocab-extra-ids", "5")
    assert llama.tokenizer_model == "m"
    assert capsys.readouterr().err == (
        "note: --vocab-extra-ids changes nothing in the data; give it to training.\n"
        "note: --vocab is the old name of --tokenizer-model.\n"
    )
    for flags, message in (
        (
            ("--vocab", "v", "--tokenizer-model", "m"),
            r"vocab \(v\) must be left out when tokenizer",
        ),
        (("--tokenizer-metadata", "m"), r"tokenizer_metadata \(m\) must be left out"),
        (("--tokenizer-sentencepiece-legacy",), "legacy .True. must be left out with Llama2"),
        (("--tiktoken-pattern", "v1"), r"tiktoken_pattern \(v1\) .* belongs to TikTokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            parsed("--tokenizer-type", "Llama2Tokenizer", *flags)


def test_no_tokenizer_imports_torch_or_megatron(
    spm_model: str, hf_folder: Path, tik_model: str, gpt2_files: Path
) -> None:
    files = {"vocab_file": f"{gpt2_files}/vocab.json", "merge_file": f"{gpt2_files}/merges.txt"}
    options = [
        TokenizerOptions("SentencePieceTokenizer", spm_model),
        TokenizerOptions("HuggingFaceTokenizer", str(hf_folder)),
        TokenizerOptions("TikTokenizer", tik_model, 1264),
        TokenizerOptions("GPT2BPETokenizer", **files),
    ]
    code = (
        "import sys\n"
        "from megatron_satformer.data.tokenizers.hugging_face import hide_torch\n"
        "from megatron_satformer.data.tokenizers.options import TokenizerOptions\n"
        "from megatron_satformer.data.tokenizers.exact import build_tokenizer\n"
        "hide_torch()\n"
        f"for options in {options!r}: assert build_tokenizer(options).encode('the words')\n"
        "loaded = {name for name in ('torch', 'megatron') if sys.modules.get(name)}\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("SFTTokenizer", "x"),
            r"tokenizer_type \(SFTTokenizer\) must be one of SentencePieceTokenizer, .*NullToken",
        ),
        (("SentencePieceTokenizer",), r"tokenizer_model \(not given\) must be a SentencePiece"),
        (("Llama2Tokenizer", "/none.model"), r"tokenizer_model \(/none.model\) does not exist"),
        (("SentencePieceTokenizer", "{here}"), r"is a folder. Did you mean .*tokenizer\.model\?"),
        (("SentencePieceTokenizer", "{here}/bad.model"), "must be a SentencePiece model file"),
        (("SentencePieceTokenizer", "x", 5), r"vocab_size \(5\) must be left out"),
        (("HuggingFaceTokenizer",), r"must be a local folder with tokenizer\.json"),
        (("HuggingFaceTokenizer", "/none"), r"tokenizer_model \(/none\) does not exist"),
        (("HuggingFaceTokenizer", "{here}"), "cannot be read as a Hugging Face tokenizer"),
        (("NullTokenizer",), r"vocab_size \(None\) must be at least 1"),
        (("NullTokenizer", None, 0), r"vocab_size \(0\) must be at least 1"),
        (("NullTokenizer", "x", 5), r"tokenizer_model \(x\) must be left out"),
        (("TikTokenizer", "{here}"), r"is a folder. It must be a TikToken vocabulary"),
        (("GPT2BPETokenizer",), r"vocab_file \(not given\) must be GPT-2's vocab.json"),
        (
            ("GPT2BPETokenizer", None, None, "{here}/bad.model", "{here}/none"),
            r"merge_file \(.*none\) does not exist",
        ),
        (
            ("GPT2BPETokenizer", None, None, "{here}/bad.model", "{here}/bad.model"),
            "must be GPT-2's vocab.json and merges.txt",
        ),
    ],
)
def test_bad_options(options: tuple, message: str, tmp_path: Path) -> None:
    if options[0] == "HuggingFaceTokenizer":
        pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").touch()
    (tmp_path / "bad.model").write_bytes(b"not a model")
    values = [v.format(here=tmp_path) if isinstance(v, str) else v for v in options]
    with pytest.raises(ValueError, match=message):
        build_tokenizer(TokenizerOptions(*values))


def test_null_eod_outside_the_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"null_tokenizer_eod_id \(9\) must be from 0"):
        build_tokenizer(TokenizerOptions("NullTokenizer", None, 9, null_tokenizer_eod_id=9))


def test_null_names_text_that_is_no_numbers() -> None:
    tokenizer = build_tokenizer(TokenizerOptions("NullTokenizer", None, 10))
    with pytest.raises(ValueError, match=r"numbers with one space between.*'hello'"):
        tokenizer.encode("hello")
