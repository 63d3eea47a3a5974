"""Tokens of a sentence in their categories, whatever tokenizer made them."""

import re

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from megatron_satformer.analysis.gates.categories import (
    GROUPS,
    TokenTexts,
    categorize,
    find_frequencies,
)
from megatron_satformer.checkpoint.hugging_face.tokenizer import build_transformers_tokenizer
from megatron_satformer.data.tokenizers.options import TokenizerOptions
from megatron_satformer.data.tokenizers.training import train_tokenizer
from tests.texts import write_lines

TEXT = "The king met Juliet in 1599, in Verona. Then he slept\nBut the king's men came."
KINDS = {
    "Juliet": "name",
    "Verona": "name",
    "1599": "digits",
    ",": "punctuation",
    ".": "punctuation",
    "Then": "function word",
    "But": "function word",
    "The": "function word",
    "in": "function word",
    "king": "other word",
    "slept": "other word",
    "men": "other word",
}


@pytest.fixture(scope="module", params=["SentencePiece", "byte-level BPE"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = [TEXT, "king men met in the slept came he", "The man slept in the king's bed."] * 20
    if request.param == "SentencePiece":
        corpus = write_lines(folder / "corpus.jsonl", [{"text": line} for line in lines])
        model = str(train_tokenizer([corpus], folder / "tokenizer", 330).model)
        return build_transformers_tokenizer(TokenizerOptions("SentencePieceTokenizer", model))
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(lines, 300, show_progress=False, special_tokens=["<eod>"])
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token="<eod>")


def test_categories(tokenizer):
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    texts = TokenTexts(tokenizer)
    assert "".join(texts(ids)).lstrip() == TEXT
    losses = np.full((1, len(ids)), 0.5)
    losses[0, 0], losses[0, 1] = np.nan, 9.0
    fifths = np.zeros(len(tokenizer), np.int8)
    found = categorize(np.array([ids]), texts, fifths, losses, np.array([0.1, 0.2, 1.0, 2.0]))
    names = {
        group: [GROUPS[group][n] if n >= 0 else None for n in codes[0]]
        for group, codes in found.items()
    }
    spans = [(m.start(), m.end(), m[0]) for m in re.finditer(r"\w+|[^\w\s]", TEXT)]
    at, seen = 0, set()
    for n, text in enumerate(texts(ids)):
        stripped = text.strip()
        if not stripped:
            assert names["kind"][n] == "no word"
            continue
        at = TEXT.index(stripped, at)
        begin, end, word = next(span for span in spans if span[0] <= at < span[1])
        whole = len(stripped) == end - begin
        at += len(stripped)
        if word in KINDS and (whole or KINDS[word] not in ("function word", "punctuation")):
            assert names["kind"][n] == KINDS[word], (word, text)
            seen.add(word)
        if word.isalnum() and word != "s":
            assert names["word"][n] == (
                "word start" if at - len(stripped) == begin else "word inside"
            )
    assert seen >= {"Juliet", "Verona", "1599", ",", ".", "king", "men"}
    first = [ids.index(token) == n for n, token in enumerate(ids)]
    assert [name == "first in sequence" for name in names["occurrence"]] == first
    assert names["position"][:3] == ["0", "1 to 15", "1 to 15"]
    assert names["position"][16] == "16 to 63"
    assert names["loss"][:3] == [None, "highest fifth", "middle"]


def test_frequencies_are_fifths_of_the_tokens():
    tokens = np.repeat(np.arange(60), np.arange(80, 20, -1))
    fifths = find_frequencies(tokens.astype(np.uint16), 62)
    counts = np.bincount(fifths[tokens], minlength=5)
    np.testing.assert_allclose(counts, tokens.size / 5, rtol=0.1)
    assert fifths[0] == 4
    assert list(fifths[59:]) == [0, 0, 0]  # the last two are never seen
    assert np.all(np.diff(fifths[:60]) <= 0)
