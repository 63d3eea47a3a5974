"""The exported tokenizer gives the ids of training, whatever its type, or is refused."""

import base64
import io
import json
import random
import string
from argparse import Namespace
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from megatron_satformer.checkpoint.hugging_face.tokenizer import (
    SAMPLE_TEXTS,
    build_transformers_tokenizer,
    check_same_ids,
    load_tokenizer,
)
from megatron_satformer.checkpoint.hugging_face.tokenizer_source import (
    detect_tokenizer,
    find_tokenizer,
)
from megatron_satformer.data.tokenizers.exact import build_tokenizer
from megatron_satformer.data.tokenizers.options import TokenizerOptions

WORDS = "the of and to in that was his he it with is for as had you not be her on at by which have"


def write_model(path: Path, **options) -> Path:
    generator = random.Random(0)
    lines = [
        " " * generator.randint(0, 3)
        + " ".join(generator.choices(WORDS.split(), k=12))
        + generator.choice(".,;!?\n")
        + str(generator.randint(0, 999))
        for _ in range(400)
    ]
    lines += [string.printable] * 5
    model = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "vocab_size": 400,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "minloglevel": 2,
    }
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **{**defaults, **options}
    )
    path.write_bytes(model.getvalue())
    return path


def export_tokenizer(source: Path | TokenizerOptions, folder: Path):
    """As `to-hf` does: writes the files, loads them again and compares the ids."""
    options = source if isinstance(source, TokenizerOptions) else detect_tokenizer(source)
    build_transformers_tokenizer(options).save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    check_same_ids(tokenizer, options)
    return tokenizer


TEXTS = [
    *SAMPLE_TEXTS,
    "To be, or not to be:\n  that is the question\u2026\n\n",
    "\ttabs\tand\r\nwindows line ends\r\n",
    "  leading, trailing  ",
    "<s>the</s> <unk><0x0A>\u2581",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u4f60\u597d! \U0001f642",
]
KINDS = [
    {},
    {"add_dummy_prefix": False, "allow_whitespace_only_pieces": True, "vocab_size": 380},
    {"remove_extra_whitespaces": True},
    {"byte_fallback": False, "vocab_size": 200},
    {"model_type": "unigram", "hard_vocab_limit": False},
    {"pad_id": 3, "eos_piece": "<|end|>"},
    {"user_defined_symbols": ["<sep>"], "add_dummy_prefix": False},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_same_ids(options, tmp_path):
    model = write_model(tmp_path / "a.model", **options)
    tokenizer = export_tokenizer(model, tmp_path)
    processor = SentencePieceProcessor(model_file=str(model))
    for text in TEXTS:
        assert tokenizer.encode(text) == processor.encode(text), text
        assert tokenizer(text).input_ids == processor.encode(text), text
    assert check_same_ids(tokenizer, detect_tokenizer(model), count=500, seed=1) > 500
    assert tokenizer.bos_token_id == processor.bos_id() == 1
    assert tokenizer.eos_token_id == processor.eos_id() == 2
    pad = processor.pad_id()
    assert tokenizer.pad_token_id == (pad if pad >= 0 else 2)
    ids = [1, *processor.encode("the is at"), 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the is at"


def test_long_document(tmp_path):
    model = write_model(tmp_path / "a.model")
    tokenizer = export_tokenizer(model, tmp_path)
    text = "\n".join(f"{n} {WORDS}" for n in range(1500))
    assert tokenizer.encode(text) == SentencePieceProcessor(model_file=str(model)).encode(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "nmt_nfkc"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        ({"model_type": "word", "byte_fallback": False, "hard_vocab_limit": False}, "model_type"),
        ({"user_defined_symbols": ["<sep>"]}, "exactly"),
    ],
)
def test_refused(options, words, tmp_path):
    model = write_model(tmp_path / "a.model", **options)
    with pytest.raises(ValueError, match=words):
        export_tokenizer(model, tmp_path)


def test_a_wrong_tokenizer_is_found(tmp_path):
    right = write_model(tmp_path / "a.model")
    wrong = write_model(tmp_path / "b.model", add_dummy_prefix=False)
    tokenizer = export_tokenizer(right, tmp_path)
    with pytest.raises(ValueError, match="exactly"):
        check_same_ids(tokenizer, detect_tokenizer(wrong))


def test_folder_is_copied(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    tokenizer = export_tokenizer(write_model(tmp_path / "a.model"), first)
    again = export_tokenizer(first, second)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)


END = "<|endoftext|>"
ODD = [*TEXTS, f"a {END}b <extra> </s>the<SPECIAL_9><s> [INST]", "don't DON'T 1234\r\n\r\n  x"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Path:
    """Folder with tokenizer.json (its template adds <s>), and GPT-2's two files in gpt2/."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[END, "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    folder = tmp_path_factory.mktemp("hf")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, model_max_length=77
    ).save_pretrained(folder)
    (folder / "gpt2").mkdir()
    tokenizer.model.save(str(folder / "gpt2"))
    return folder


@pytest.fixture(scope="module")
def tik_model(tmp_path_factory) -> Path:
    tokens = [bytes([n]) for n in range(256)]
    tokens += [
        b"th",
        b"the",
        b" t",
        b" the",
        b"in",
        b"\n\n",
        "\u00e9".encode(),
        b"12",
        b"aa",
        b"aaa",
    ]
    rows = [
        {"rank": n, "token_bytes": base64.b64encode(token).decode(), "token_str": ""}
        for n, token in enumerate(tokens)
    ]
    path = tmp_path_factory.mktemp("tik") / "vocab.json"
    path.write_text(json.dumps(rows))
    return path


TRAINED_WITH = {
    "hf folder": ("HuggingFaceTokenizer", "", {}),
    "hf file": ("HuggingFaceTokenizer", "tokenizer.json", {}),
    "hf no template": (
        "HuggingFaceTokenizer",
        "",
        {"tokenizer_hf_no_include_special_tokens": True},
    ),
    "hf more tokens": ("HuggingFaceTokenizer", "", {"special_tokens": ("<extra>",)}),
    "gpt2": ("GPT2BPETokenizer", "gpt2", {"special_tokens": ("<extra>",)}),
    "tik v1": ("TikTokenizer", None, {"vocab_size": 1266, "tiktoken_pattern": "v1"}),
    "tik v2 cut": (
        "TikTokenizer",
        None,
        {"vocab_size": 280, "tiktoken_num_special_tokens": 20},
    ),
}


@pytest.mark.parametrize("name", TRAINED_WITH)
def test_every_type_of_training(name, byte_level, tik_model, tmp_path):
    kind, place, flags = TRAINED_WITH[name]
    if kind == "GPT2BPETokenizer":
        folder = byte_level / place
        files = {"vocab_file": folder / "vocab.json", "merge_file": folder / "merges.txt"}
        flags = {**flags, **{name: str(file) for name, file in files.items()}}
    else:
        model = tik_model if place is None else byte_level / place
        flags = {**flags, "tokenizer_model": str(model)}
    # as a checkpoint has them: what Megatron did not read for the type says nothing
    args = Namespace(tokenizer_type=kind, vocab_size=7, tokenizer_sentencepiece_legacy=1)
    vars(args).update(flags)
    options = find_tokenizer(args, None)
    reference = build_tokenizer(TokenizerOptions(kind, **flags))
    tokenizer = export_tokenizer(options, tmp_path)
    assert [tokenizer(text).input_ids for text in ODD] == [reference.encode(text) for text in ODD]
    assert len(tokenizer) == reference.vocab_size
    assert tokenizer.eos_token_id == reference.eod
    ids = [n for n in reference.encode("the  caf\u00e9 12") if n != 1]
    assert tokenizer.decode(ids) == "the  caf\u00e9 12"
    if kind == "HuggingFaceTokenizer":
        assert tokenizer.model_max_length == 77
        assert (tokenizer("").input_ids == [1]) == (name != "hf no template")


def test_tokenizer_given_in_place_of_the_checkpoints(byte_level, tik_model, tmp_path):
    """Of the same type, it is read as the checkpoint's own would be; of another, as it is."""
    gone = {"tokenizer_model": "/gone", "vocab_size": 1266, "tiktoken_pattern": "v1"}
    args = Namespace(tokenizer_type="TikTokenizer", **gone)
    with pytest.raises(ValueError, match=r"tokenizer_model of the checkpoint \(/gone\) does not"):
        find_tokenizer(args, None)
    found = find_tokenizer(args, str(tik_model))
    assert (found.tokenizer_type, found.vocab_size) == ("TikTokenizer", 1266)
    assert find_tokenizer(args, str(byte_level)) == detect_tokenizer(byte_level)
    assert find_tokenizer(args, str(byte_level / "gpt2")).tokenizer_type == "GPT2BPETokenizer"
    assert find_tokenizer(args, "none") is None
    assert find_tokenizer(Namespace(tokenizer_type="NullTokenizer"), None) is None
    model = write_model(tmp_path / "tokenizer.model")
    expected = TokenizerOptions("SentencePieceTokenizer", str(model))
    assert find_tokenizer(args, str(model)) == find_tokenizer(args, str(tmp_path)) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"tokenizer_type": "MultimodalTokenizer"},
            r"tokenizer_type \(MultimodalTokenizer\) cannot",
        ),
        (
            {"tokenizer_type": "GPT2BPETokenizer"},
            r"vocab_file of the checkpoint \(None\) does not exist",
        ),
        ({"special_tokens": ["<extra>"]}, r"special_tokens \(<extra>\) must be left out"),
        ({"tokenizer_sentencepiece_legacy": True}, "tokenizer_sentencepiece_legacy"),
        ({"metadata_path": "tokenizer.yaml"}, r"tokenizer_metadata \(tokenizer.yaml\)"),
        ({"tokenizer_model": None}, "does not exist here"),
    ],
    ids=str,
)
def test_refused_options_of_a_checkpoint(changes, words):
    args = Namespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model=__file__)
    vars(args).update(changes)
    with pytest.raises(ValueError, match=rf"{words}.*--tokenizer"):
        find_tokenizer(args, None)


def test_chat_template_is_kept(byte_level):
    options = detect_tokenizer(byte_level)
    assert build_transformers_tokenizer(options, "{{ messages }}").chat_template == "{{ messages }}"


def test_code_is_not_run(tmp_path):
    config = {"tokenizer_class": "Letters", "auto_map": {"AutoTokenizer": ["code.Letters", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"neither run nor exported.*--tokenizer none"):
        detect_tokenizer(tmp_path)
    args = Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path))
    with pytest.raises(ValueError, match="neither run nor exported"):
        find_tokenizer(args, None)
