from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_satformer.data.tokenizers import TokenizerOptions, build_tokenizer

END = "<|endoftext|>"


def megatron_tokenizer(kind: str, model: str | None = None, vocab_size: int | None = None):
    """Megatron's own, with its parser's defaults (megatron/training/config TokenizerConfig)."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer as build

    return build(
        SimpleNamespace(
            tokenizer_type=kind,
            tokenizer_model=model,
            vocab_size=vocab_size,
            vocab_file=None,
            merge_file=None,
            special_tokens=None,
            metadata_path=None,
            chat_template=None,
            tokenizer_sentencepiece_legacy=False,
            tokenizer_sentencepiece_ignore_extra_whitespaces=True,
            tokenizer_hf_no_use_fast=False,
            tokenizer_hf_no_include_special_tokens=False,
            trust_remote_code=False,
            pad_vocab_size=False,
        )
    )


def assert_equal(options: TokenizerOptions, texts: list[str]) -> None:
    ours = build_tokenizer(options)
    theirs = megatron_tokenizer(options.tokenizer_type, options.tokenizer_model, options.vocab_size)
    assert ours.vocab_size == theirs.vocab_size
    assert ours.eod == theirs.eod
    for text in texts:
        assert list(ours.encode(text)) == list(theirs.tokenize(text))


@pytest.mark.parametrize(
    "kind", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"]
)
def test_sentencepiece_equals_megatrons(kind: str, spm_model: str, texts: list[str]) -> None:
    assert_equal(TokenizerOptions(kind, spm_model), texts)


def test_null_equals_megatrons() -> None:
    assert_equal(TokenizerOptions("NullTokenizer", None, 321), ["1 2 3", "320", "0 0"])


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
    PreTrainedTokenizerFast(tokenizer_file=file, eos_token=END).save_pretrained(folder)
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
    ("options", "message"),
    [
        (
            ("TikTokenizer", "x"),
            r"tokenizer_type \(TikTokenizer\) must be one of SentencePieceTokenizer, .*NullToken",
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


def test_null_names_text_that_is_no_numbers() -> None:
    tokenizer = build_tokenizer(TokenizerOptions("NullTokenizer", None, 10))
    with pytest.raises(ValueError, match=r"numbers with one space between.*'hello'"):
        tokenizer.encode("hello")
