"""Tokenizers by Megatron's flag names, with its ids, `eod` and `vocab_size`, without torch.

Each class gives what `megatron.core.tokenizers` of 0.19.2 gives for the same flags; tests hold the
two together. The class to build is chosen by `--tokenizer-type`. To users, who choose between them
and the fast backend, they are the reference.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_satformer.data.tokenizers.hugging_face import GPT2BPETokenizer, HuggingFaceTokenizer
from megatron_satformer.data.tokenizers.options import (
    SENTENCEPIECE,
    TokenizerOptions,
    check_tokenizer_options,
)
from megatron_satformer.data.tokenizers.tiktoken_tokenizer import TikTokenizer


class Tokenizer(Protocol):
    """What the data tools need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, before Megatron pads it."""

    @property
    def eod(self) -> int | None:
        """Id that ends a document, or None if the tokenizer has none."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without `eod`."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns what `encode` gives for each text, in one call and one thread."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens included."""


class SentencePieceTokenizer:
    """A SentencePiece model; `eod` is its `</s>`, as in Megatron."""

    def __init__(self, options: TokenizerOptions) -> None:
        from sentencepiece import SentencePieceProcessor

        model = options.existing_file(
            "tokenizer_model",
            "a SentencePiece .model file. Train one with tools/train_tokenizer.py",
        )
        try:
            self.processor = SentencePieceProcessor(model_file=model)
        except (RuntimeError, OSError):
            raise ValueError(
                f"tokenizer_model ({model}) must be a SentencePiece model file; this one cannot "
                "be read as such. Train one with tools/train_tokenizer.py."
            ) from None
        encode = self.processor.encode_as_ids
        keeps_whitespaces = not options.tokenizer_sentencepiece_ignore_extra_whitespaces
        if keeps_whitespaces and encode("x  y") == encode("x y"):
            raise ValueError(
                "tokenizer_sentencepiece_ignore_extra_whitespaces (False) must be left out: this "
                "model drops repeated spaces. Train one that keeps them, with "
                "tools/train_tokenizer.py."
            )
        self.vocab_size: int = self.processor.get_piece_size()
        eos: int = self.processor.eos_id()
        self.eod: int | None = eos if eos >= 0 else None
        # The bound method, not a wrapper: this is the inner loop.
        self.encode: Callable[[str], list[int]] = encode

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text."""
        # Not the library's own batch call, which starts a thread pool each time.
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        return str(self.processor.decode(list(ids)))


class NullTokenizer:
    """Text that is ids already: decimal numbers with one space between."""

    def __init__(self, options: TokenizerOptions) -> None:
        size, eod = options.vocab_size, options.null_tokenizer_eod_id
        if size is None or size < 1:
            raise ValueError(
                f"vocab_size ({size}) must be at least 1 with NullTokenizer. Pass --vocab-size."
            )
        if eod is not None and not 0 <= eod < size:
            raise ValueError(
                f"null_tokenizer_eod_id ({eod}) must be from 0 to vocab_size ({size}) less one. "
                "Leave it out for the last id."
            )
        self.vocab_size = size
        self.eod: int | None = size - 1 if eod is None else eod

    def encode(self, text: str) -> list[int]:
        """Returns the numbers in `text`."""
        try:
            return [int(number) for number in text.split(" ")]
        except ValueError:
            raise ValueError(
                "NullTokenizer wants numbers with one space between, but the text starts "
                f"{text[:40]!r}"
            ) from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the numbers in each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the ids, which are the text."""
        return " ".join(map(str, ids))


CLASSES: dict[str, Callable[[TokenizerOptions], Tokenizer]] = {
    **dict.fromkeys(SENTENCEPIECE, SentencePieceTokenizer),
    "HuggingFaceTokenizer": HuggingFaceTokenizer,
    "TikTokenizer": TikTokenizer,
    "GPT2BPETokenizer": GPT2BPETokenizer,
    "NullTokenizer": NullTokenizer,
}


def build_tokenizer(options: TokenizerOptions) -> Tokenizer:
    """Builds the tokenizer that the flags name.

    Raises:
        ValueError: If the type is not supported, a file is missing or unreadable, or a flag is
            given that this type does not read.
    """
    check_tokenizer_options(options)
    return CLASSES[options.tokenizer_type](options)
