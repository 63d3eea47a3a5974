"""The exported tokenizer gives sentencepiece's own ids, or is refused."""

import io
import random
import string
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from megatron_satformer.checkpoint.tokenizer import SAMPLE_TEXTS, check_same_ids, export_tokenizer

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
    assert check_same_ids(tokenizer, model, count=500, seed=1) > 500
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
        check_same_ids(tokenizer, wrong)


def test_folder_is_copied(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    tokenizer = export_tokenizer(write_model(tmp_path / "a.model"), first)
    again = export_tokenizer(first, second)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
