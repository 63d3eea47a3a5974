"""Examples as tokens of one length, and which of them are answers."""

import re

import numpy as np
import numpy.typing as npt

from megatron_satformer.analysis.retrieval.examples import Example
from megatron_satformer.analysis.retrieval.vocabulary import Vocabulary
from megatron_satformer.data.tokenizers.exact import Tokenizer

WORD = re.compile(r" \S+")


class Encoder:
    """Turns examples into tokens, exactly as the tokenizer does a text.

    Args:
        tokenizer: Of the model.
        vocabulary: Of the examples, if every word of theirs is one token.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary | None = None) -> None:
        if tokenizer.eod is None:
            raise ValueError("tokenizer must have a token that ends a document. Use another.")
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._eod = tokenizer.eod

    def count(self, text: str) -> int:
        """Returns the tokens of a text."""
        return len(self._tokenizer.encode(text))

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._tokenizer.vocab_size

    @property
    def before(self) -> int:
        """Tokens before the first word."""
        return len(self._vocabulary.before) if self._vocabulary else 0

    def encode(self, example: Example, length: int) -> tuple[npt.NDArray, npt.NDArray]:
        """Returns the tokens of an example, ended and filled up, and 1 for those of answers.

        Args:
            example: Of at most `length` - 1 tokens.
            length: Tokens to return.

        Raises:
            ValueError: If its answers are not whole tokens.
        """
        split = self._split_words if self._vocabulary else self._split_text
        pieces = split(example)
        ids = np.full(length, self._eod, dtype=np.int64)
        marks = np.zeros(length, dtype=np.uint8)
        at = 0
        for number, piece in enumerate(pieces):
            ids[at : at + len(piece)] = piece
            marks[at : at + len(piece)] = number % 2
            at += len(piece)
        if self._tokenizer.encode(example.text) != ids[:at].tolist() or at >= length:
            raise ValueError(
                "tokenizer must encode an example as its parts, one after the other; this one does "
                f"not: {example.text[:60]!r}. Use another."
            )
        return ids, marks

    def _split_words(self, example: Example) -> list[list[int]]:
        vocabulary = self._vocabulary
        assert vocabulary is not None
        parts = list(example.parts)
        if vocabulary.strips:
            parts[0] = f" {parts[0]}"
        pieces = [[vocabulary.ids[word] for word in WORD.findall(part)] for part in parts]
        pieces[0] = [*vocabulary.before, *pieces[0]]
        return pieces

    def _split_text(self, example: Example) -> list[list[int]]:
        pieces: list[list[int]] = []
        done = 0
        for end in (end for span in example.spans() for end in span):
            head = self._tokenizer.encode(example.text[:end])
            pieces.append(head[done:])
            done = len(head)
        return pieces
