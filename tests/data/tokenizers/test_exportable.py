"""What is said before training is what the export says after it."""

import json
from pathlib import Path

import pytest

from megatron_satformer.checkpoint.hugging_face.tokenizer import (
    build_transformers_tokenizer,
    check_same_ids,
)
from megatron_satformer.data.tokenizers.exact import build_tokenizer
from megatron_satformer.data.tokenizers.exportable import export_obstacle, export_warning
from megatron_satformer.data.tokenizers.options import TokenizerOptions
from megatron_satformer.data.tokenizers.sentencepiece_pipeline import build_pipeline, read_proto
from tests.checkpoint.hugging_face.test_tokenizer import write_model

RUN = "\u2581\u2581"
FREE = {"add_dummy_prefix": False}
UNIGRAM = {"model_type": "unigram", "hard_vocab_limit": False}
# What a model is trained with, what it then has, and a text of which an export would give other
# ids, where one could be made at all.
INEXACT = [
    (
        {"user_defined_symbols": [RUN, f"{RUN}\u2581"], **FREE},
        rf"user-defined pieces with spaces \('{RUN}', '{RUN}\u2581'\)",
        "two  spaces,   three,        many",
    ),
    ({"user_defined_symbols": [RUN], **FREE, **UNIGRAM}, "pieces with spaces", "    the"),
    ({"user_defined_symbols": ["is a", RUN], **FREE}, f"'is a', '{RUN}'", "is a"),
    ({"user_defined_symbols": ["<sep>"]}, r"\('<sep>'\), and puts a space in front", "a<sep>b"),
    (
        {"user_defined_symbols": ["<sep>"], "remove_extra_whitespaces": True, **FREE},
        "and drops repeated spaces",
        "a <sep> b",
    ),
    ({"normalization_rule_name": "nmt_nfkc"}, "normalisation 'nmt_nfkc'", None),
    ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix", None),
]
EXACT = [
    {},
    {"remove_extra_whitespaces": True},
    {"user_defined_symbols": ["<sep>", "\n\n", "<a>", "<a>b"], **FREE},
    {"control_symbols": ["<x>"]},
    {**UNIGRAM, "user_defined_symbols": ["<sep>"], **FREE},
]


def write(folder: Path, **options: object) -> TokenizerOptions:
    return TokenizerOptions(
        "SentencePieceTokenizer", str(write_model(folder / "a.model", **options))
    )


@pytest.mark.parametrize(("trained", "has", "text"), INEXACT, ids=str)
def test_what_cannot_be_exported_is_said_and_refused(
    trained: dict, has: str, text: str | None, tmp_path: Path
) -> None:
    options = write(tmp_path, **trained)
    warning = export_warning(options)
    assert warning is not None
    assert "\n" not in warning
    assert f"tokenizer_model ({options.tokenizer_model}) has " in warning
    assert "--tokenizer none" in warning
    with pytest.raises(ValueError, match=f"{has}.* cannot be exported exactly"):
        build_transformers_tokenizer(options)
    if text is not None:
        pipeline = build_pipeline(read_proto(Path(str(options.tokenizer_model))))
        assert pipeline.encode(text).ids != build_tokenizer(options).encode(text)


@pytest.mark.parametrize("trained", EXACT, ids=str)
def test_what_can_be_exported_draws_no_warning(trained: dict, tmp_path: Path) -> None:
    options = write(tmp_path, **trained)
    assert export_warning(options) is None
    assert check_same_ids(build_transformers_tokenizer(options), options, count=300) > 300


def test_python_code_of_its_own_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": "x"}})
    )
    options = TokenizerOptions("HuggingFaceTokenizer", str(tmp_path), trust_remote_code=True)
    assert export_obstacle(options) == "Python code of its own"
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert export_obstacle(options) is None


def test_types_without_such_a_model_draw_none() -> None:
    for kind in ("NullTokenizer", "TikTokenizer", "GPT2BPETokenizer", "none"):
        assert export_warning(TokenizerOptions(kind)) is None
