"""The fast backend gives the reference's ids, or says before the first document that it cannot."""

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastokens")
pytest.importorskip("transformers")

from sentencepiece import SentencePieceTrainer
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from megatron_satformer.data.tokenizers.exact import build_tokenizer
from megatron_satformer.data.tokenizers.fast import (
    FastTokenizer,
    FastUnavailable,
    fast_pipeline,
    means_the_same,
)
from megatron_satformer.data.tokenizers.options import TokenizerOptions
from megatron_satformer.data.tokenizers.training import SPLIT
from tests.texts import source_texts

ROOT = Path(__file__).resolve().parents[3]
END = "<|endoftext|>"
ODD = [
    *(
        "",
        " ",
        "  ",
        "\t",
        "\n",
        "\n\n",
        "\r\n",
        "\x00",
        "\x1c",
        "\x85",
        "\xa0",
        "\u200b",
        "\u3000",
    ),
    *("e\u0301", "\u0301", "\ufb01", "\u00bd", "\u2167", "\u0130", "\u00df", "\u017f", "'\u017fe"),
    *("\u180e", "a\u180e ", "\u0660\u0661\u0662\u0663", "\u65e5\u672c\u8a9e", "\u1100\u1161"),
    *("\U0001f468\u200d\U0001f469", "\U0001d54f", "\ufffd", "\U0010ffff", "\u1c89", "\U000105c9"),
    *("</s>", "<s>", "<unk>", "<0x41>", "<0xE9>", END, "<left>", "<right>", "<word>", "<norm>"),
    *("\u2581", "\u2581\u2581", "<sep>", "don't", "I'LL", "1234567", "x" * 500, " " * 90, "the "),
]
TEXTS = st.lists(st.sampled_from(ODD) | st.text(max_size=8), max_size=10).map("".join)


def assert_same(options: TokenizerOptions, examples: int = 50) -> FastTokenizer:
    """Compares on real, odd and generated texts, and on code points in a context."""
    reference = build_tokenizer(options)
    fast = FastTokenizer(fast_pipeline(options, reference))

    def check(texts: list[str]) -> None:
        taken = [text for text in texts if fast.takes(text)]
        ids, lengths = fast.encode_batch(taken)
        ends = list(itertools.accumulate(lengths.tolist(), initial=0))
        actual = [ids[a:b].tolist() for a, b in itertools.pairwise(ends)]
        for text, one, other in zip(taken, actual, reference.encode_batch(taken), strict=True):
            assert one == other, text

    check([])
    short = [text for text in ODD if len(text) < 50]
    check([*ODD, *(a + b for a, b in itertools.permutations(short, 2)), source_texts()[0][:20000]])
    # The first alphabets, and some of everything else.
    points = [*range(0x800), *range(0x800, 0xD800, 11), *range(0xE000, 0x110000, 307)]
    check([f"a{chr(n)}1{chr(n)} {chr(n)}\n{chr(n)}'s.{chr(n)}" for n in points])

    @settings(max_examples=examples, deadline=None, database=None)
    @given(st.lists(TEXTS, max_size=8))
    def generated(texts: list[str]) -> None:
        check(texts)

    generated()
    return fast


def pairs_model(**options) -> models.BPE:
    """A merge for any two bytes: every place where a text is cut shows in the ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(itertools.product(alphabet, repeat=2))
    tokens = [*alphabet, *(a + b for a, b in merges)]
    return models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=merges, **options)


def write_folder(folder: Path, tokenizer: Tokenizer, **config) -> TokenizerOptions:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return TokenizerOptions("HuggingFaceTokenizer", str(folder))


def split_by(*regexes: str):
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, byte_level])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
PIPELINES = {
    "gpt2": (GPT2, None),
    "prefix-space": (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
    "llama3-nfc": (split_by(SPLIT), normalizers.NFC()),
    "custom-lower": (
        split_by(r"\p{N}{1,2}", r"[\p{L}\p{M}]+|\s+(?!\S)|[^\s\p{L}]"),
        normalizers.Lowercase(),
    ),
    "digits": (pre_tokenizers.Sequence([DIGITS, GPT2]), None),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_hugging_face(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(pairs_model())
    tokenizer.pre_tokenizer, normalizer = PIPELINES[name]
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([END, "<s>"])
    tokenizer.add_tokens(
        [
            AddedToken("<left>", lstrip=True),
            AddedToken("<right>", rstrip=True, normalized=False),
            AddedToken("<word>", single_word=True),
            AddedToken("<norm>", normalized=True),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {END}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", END)],
    )
    # Files may come with these; neither applies to a document.
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding()
    options = write_folder(tmp_path, tokenizer)
    assert_same(options)
    plain = TokenizerOptions(
        "HuggingFaceTokenizer", str(tmp_path), tokenizer_hf_no_include_special_tokens=True
    )
    reference = build_tokenizer(plain)
    assert reference.encode("") == []
    fast = FastTokenizer(fast_pipeline(plain, reference))
    assert fast.encode_batch(["ab"])[0].tolist() == reference.encode("ab")


def test_special_tokens_that_are_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(pairs_model())
    tokenizer.pre_tokenizer = GPT2
    tokenizer.add_special_tokens([END])
    options = write_folder(tmp_path, tokenizer, split_special_tokens=True)
    assert_same(options, examples=10)
    assert len(build_tokenizer(options).encode(END)) > 1


def write_model(path: Path, **options) -> TokenizerOptions:
    lines = [line for text in source_texts()[:3] for line in text.split("\n") if line.strip()]
    model = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "vocab_size": 700,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "byte_fallback": True,
        "minloglevel": 2,
    }
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines[:3000]), model_writer=model, **{**defaults, **options}
    )
    path.write_bytes(model.getvalue())
    return TokenizerOptions("SentencePieceTokenizer", str(path))


@pytest.mark.parametrize(
    "kind",
    [
        {"allow_whitespace_only_pieces": True},
        {"add_dummy_prefix": True, "remove_extra_whitespaces": True},
        {"byte_fallback": False, "character_coverage": 0.98, "control_symbols": ["<word>"]},
        {"add_dummy_prefix": True, "user_defined_symbols": ["<sep>", END]},
        {"user_defined_symbols": ["<sep>"]},
    ],
    ids=str,
)
def test_sentencepiece(kind: dict, tmp_path: Path) -> None:
    assert_same(write_model(tmp_path / "a.model", **kind))


def test_gpt2_files(tmp_path: Path) -> None:
    pairs_model().save(str(tmp_path))
    assert_same(
        TokenizerOptions(
            "GPT2BPETokenizer",
            vocab_file=f"{tmp_path}/vocab.json",
            merge_file=f"{tmp_path}/merges.txt",
        ),
        examples=10,
    )


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"model_type": "unigram"}, "is not of type BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "has normalisation 'nmt_nfkc'"),
        ({"user_defined_symbols": ["\u2581\u2581"]}, r"The fast engine gives \["),
        (
            {"user_defined_symbols": [f"<{n}>" for n in range(20)], "add_dummy_prefix": True},
            "21 special strings would have to be looked for",
        ),
    ],
    ids=str,
)
def test_sentencepiece_models_without_a_fast_equal(options, why: str, tmp_path: Path) -> None:
    options = write_model(tmp_path / "a.model", **options)
    with pytest.raises(FastUnavailable, match=why):
        fast_pipeline(options, build_tokenizer(options))


@pytest.mark.parametrize(
    ("model", "pre_tokenizer", "why"),
    [
        (pairs_model(dropout=0.1), GPT2, "The tokenizer drops merges at random"),
        (models.BPE(vocab={"a": 0, "b": 1}, merges=[]), GPT2, "does not have all 256 bytes"),
        (pairs_model(), split_by(r"\w+"), r"The regex '\\\\w\+' may mean something else"),
        (pairs_model(), pre_tokenizers.Punctuation(), "does not have all 256 bytes"),
        (pairs_model(unk_token="a"), pre_tokenizers.Punctuation(), "The fast engine refuses it"),
        (
            models.WordLevel({"a": 0}, unk_token="a"),
            GPT2,
            "The tokenizer's model is WordLevel, not BPE",
        ),
    ],
    ids=["dropout", "alphabet", "regex", "no-bytes", "unsupported", "word-level"],
)
def test_tokenizers_without_a_fast_equal(model, pre_tokenizer, why: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    options = write_folder(tmp_path, tokenizer)
    with pytest.raises(FastUnavailable, match=why):
        fast_pipeline(options, build_tokenizer(options))


def test_null_has_no_fast_equal() -> None:
    options = TokenizerOptions("NullTokenizer", None, 5)
    with pytest.raises(FastUnavailable, match="NullTokenizer has no fast equal"):
        fast_pipeline(options, build_tokenizer(options))


def test_a_missing_package_is_named(spm: TokenizerOptions, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    with pytest.raises(FastUnavailable, match="fastokens is not installed"):
        fast_pipeline(spm, build_tokenizer(spm))


def test_texts_on_which_the_engines_differ_are_not_taken(tmp_path: Path) -> None:
    """The routed characters are needed: without routing these two texts come out wrong."""
    tokenizer = Tokenizer(pairs_model())
    for regex, text in ((SPLIT, "'\u017fe"), (r"\s+|\S+", "x\u180e")):
        tokenizer.pre_tokenizer = split_by(regex)
        options = write_folder(tmp_path, tokenizer)
        reference = build_tokenizer(options)
        fast = FastTokenizer(fast_pipeline(options, reference))
        assert not fast.takes(text)
        assert fast.encode_batch([text])[0].tolist() != reference.encode(text)
    assert fast.takes("any other \u65e5 text")


def test_a_regex_without_end_is_an_error_about_the_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(pairs_model())
    tokenizer.pre_tokenizer = split_by(r"(a+)+b|.")
    options = write_folder(tmp_path, tokenizer)
    reference = build_tokenizer(options)
    fast = FastTokenizer(fast_pipeline(options, reference))
    with pytest.raises(ValueError, match="match limit exceeded"):
        fast.encode_batch(["a" * 5000])
    with pytest.raises(ValueError, match="tokenizers gives up on this text"):
        reference.encode("a" * 5000)


@pytest.mark.parametrize(
    ("regex", "same"),
    [
        (SPLIT, True),
        (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+| ?[^\s\p{L}]++[\r\n]*|\s+(?!\S)", True),
        (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[一-龥]+", True),
        (r"(?<=a)b(?<!c)d|\p{Lu}\p{Ll}*", True),
        *((r, False) for r in (r"\w", r"\b", r"\h", "^a", "a$", r"\p{N}{1,3}+", r"\p{Han}", r"\X")),
        *(
            (r, False)
            for r in ("[[:alpha:]]", "[a&&b]", "[a[b]]", "(?i)k", "(?i:k)", r"\Aa", "(?>a)")
        ),
    ],
)
def test_regex_syntax(regex: str, same: bool) -> None:
    assert means_the_same(regex) is same


def test_one_thread(spm: TokenizerOptions) -> None:
    code = (
        "import os\n"
        "from megatron_satformer.data.tokenizers.fast import *\n"
        "from megatron_satformer.data.tokenizers.exact import *\n"
        f"options = {spm!r}\n"
        "fast = FastTokenizer(fast_pipeline(options, build_tokenizer(options)))\n"
        "before = os.listdir('/proc/self/task')\n"
        "fast.encode_batch(['some words ' * 1000] * 200)\n"
        "print(len(os.listdir('/proc/self/task')) - len(before))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout == "0\n"
