"""Tokenizers by Megatron's flag names, with its ids, `eod` and `vocab_size`, without torch.

Each class gives what `megatron.core.tokenizers` of 0.19.2 gives for the same flags; tests hold the
two together. The class to build is chosen by `--tokenizer-type`.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class TokenizerOptions:
    """The tokenizer flags. Small and picklable: worker processes build their own tokenizer from it.

    Attributes:
        tokenizer_type: One of SUPPORTED.
        tokenizer_model: SentencePiece model file, or Hugging Face folder or tokenizer.json.
        vocab_size: Size of the vocabulary, for NullTokenizer alone.
    """

    tokenizer_type: str
    tokenizer_model: str | None = None
    vocab_size: int | None = None


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


class SentencePieceTokenizer:
    """A SentencePiece model; `eod` is its `</s>`, as in Megatron."""

    def __init__(self, model: str) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self.processor = SentencePieceProcessor(model_file=model)
        except (RuntimeError, OSError):
            raise ValueError(
                f"tokenizer_model ({model}) must be a SentencePiece model file; this one cannot "
                "be read as such. Train one with tools/train_tokenizer.py."
            ) from None
        self.vocab_size: int = self.processor.get_piece_size()
        eos: int = self.processor.eos_id()
        self.eod: int | None = eos if eos >= 0 else None
        # The bound method, not a wrapper: this is the inner loop.
        self.encode: Callable[[str], list[int]] = self.processor.encode_as_ids


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer from a local folder or tokenizer.json; never looks on the network.

    Goes through `transformers.AutoTokenizer`, as Megatron does, because the class named in
    tokenizer_config.json may change what tokenizer.json alone would give. That import costs torch.
    The file tokenizer.json stands for its folder if that has a tokenizer_config.json; Megatron's
    training wants the folder.
    """

    def __init__(self, model: str) -> None:
        try:
            from transformers import AutoTokenizer, PreTrainedTokenizerFast
        except ImportError:
            raise ValueError(
                "tokenizer_type (HuggingFaceTokenizer) needs the package transformers. "
                "Install it: pip install transformers."
            ) from None
        try:
            path = Path(model)
            if path.is_file() and (path.parent / "tokenizer_config.json").exists():
                path = path.parent
            if path.is_file():
                tokenizer = PreTrainedTokenizerFast(tokenizer_file=model)
            else:
                tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise ValueError(
                f"tokenizer_model ({model}) cannot be read as a Hugging Face tokenizer: {reason} "
                "It must be a folder with tokenizer.json, or that file."
            ) from None
        # Otherwise a long document draws a warning about what a model could take.
        tokenizer.model_max_length = int(1e30)
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        # Megatron takes the separator where there is no end-of-sequence token.
        token = tokenizer.eos_token or tokenizer.sep_token
        self.eod: int | None = tokenizer.convert_tokens_to_ids(token) if token else None

    def encode(self, text: str) -> list[int]:
        """Returns the ids, with whatever the tokenizer's own template adds, as Megatron does."""
        ids: list[int] = self.tokenizer(text).input_ids
        return ids


class NullTokenizer:
    """Text that is ids already: decimal numbers with one space between. `eod` is the last id."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eod: int | None = vocab_size - 1

    def encode(self, text: str) -> list[int]:
        """Returns the numbers in `text`."""
        try:
            return [int(number) for number in text.split(" ")]
        except ValueError:
            raise ValueError(
                "NullTokenizer wants numbers with one space between, but the text starts "
                f"{text[:40]!r}"
            ) from None


SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
SUPPORTED = (*SENTENCEPIECE, "HuggingFaceTokenizer", "NullTokenizer")


def build_tokenizer(options: TokenizerOptions) -> Tokenizer:
    """Builds the tokenizer that the flags name.

    Raises:
        ValueError: If the type is not supported, a file is missing or unreadable, or a flag is
            given that this type does not use.
    """
    kind = options.tokenizer_type
    if kind not in SUPPORTED:
        raise ValueError(
            f"tokenizer_type ({kind}) must be one of {', '.join(SUPPORTED)}. Other types of "
            "Megatron's are not supported here yet."
        )
    if kind == "NullTokenizer":
        if options.tokenizer_model is not None:
            raise ValueError(
                f"tokenizer_model ({options.tokenizer_model}) must be left out with NullTokenizer."
            )
        if options.vocab_size is None or options.vocab_size < 1:
            raise ValueError(
                f"vocab_size ({options.vocab_size}) must be at least 1 with NullTokenizer. Pass "
                "--vocab-size."
            )
        return NullTokenizer(options.vocab_size)
    if options.vocab_size is not None:
        raise ValueError(
            f"vocab_size ({options.vocab_size}) must be left out with {kind}: its model says it. "
            "It belongs to NullTokenizer."
        )
    model = _existing_model(kind, options.tokenizer_model)
    return SentencePieceTokenizer(model) if kind in SENTENCEPIECE else HuggingFaceTokenizer(model)


def _existing_model(kind: str, model: str | None) -> str:
    what = (
        "a SentencePiece .model file. Train one with tools/train_tokenizer.py"
        if kind in SENTENCEPIECE
        else "a local folder with tokenizer.json, or that file"
    )
    if model is None:
        raise ValueError(f"tokenizer_model (not given) must be {what} for {kind}.")
    path = Path(model)
    if not path.exists():
        raise ValueError(f"tokenizer_model ({model}) does not exist. It must be {what}.")
    if kind in SENTENCEPIECE and path.is_dir():
        inside = path / "tokenizer.model"
        hint = f"Did you mean {inside}?" if inside.exists() else f"It must be {what}."
        raise ValueError(f"tokenizer_model ({model}) is a folder. {hint}")
    return os.fspath(path)


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the tokenizer flags to a tool, by Megatron's names."""
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", required=True, help=f"One of {', '.join(SUPPORTED)}.")
    group.add_argument(
        "--tokenizer-model",
        help="SentencePiece model; for HuggingFaceTokenizer a local folder or a tokenizer.json.",
    )
    group.add_argument("--vocab-size", type=int, help="Size of the vocabulary, NullTokenizer only.")
