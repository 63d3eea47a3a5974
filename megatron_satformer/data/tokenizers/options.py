"""Megatron's tokenizer flags: which type reads which, and what is refused before a file is opened.

Names, defaults and meanings are those of 0.19.2 (megatron/training/config, TokenizerConfig). Every
flag is read by the type it is given with, or refused, or answered with a note that the data do not
depend on it.
"""

import argparse
import os
import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from megatron_satformer.cli import add_flags_of

SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
SUPPORTED = (
    *SENTENCEPIECE,
    "HuggingFaceTokenizer",
    "TikTokenizer",
    "GPT2BPETokenizer",
    "NullTokenizer",
)
# What Megatron takes for TikTokenizer where --vocab-size is left out.
TIKTOKEN_VOCAB_SIZE = 1 << 17


@dataclass(frozen=True)
class TokenizerOptions:
    """The tokenizer flags. Small and picklable: worker processes build their own tokenizer from it.

    Attributes:
        tokenizer_type: One of SUPPORTED.
        tokenizer_model: SentencePiece model; local Hugging Face folder or tokenizer.json; for
            TikTokenizer its vocabulary, a .json list.
        vocab_size: Number of ids: NullTokenizer, TikTokenizer (default there 131072).
        vocab_file: vocab.json of GPT2BPETokenizer.
        merge_file: merges.txt of GPT2BPETokenizer.
        special_tokens: Further special tokens; for TikTokenizer the whole list in place of its own
            seven.
        tiktoken_pattern: v2 if left out.
        tiktoken_num_special_tokens: Ids kept in front of the vocabulary.
        tokenizer_sentencepiece_legacy: Refused.
        tokenizer_sentencepiece_ignore_extra_whitespaces: False is refused for a model that drops
            repeated spaces; no other needs it.
        tokenizer_hf_no_use_fast: transformers' use_fast=False.
        tokenizer_hf_no_include_special_tokens: Leave out what the tokenizer's template adds, such
            as a bos.
        trust_remote_code: Run the tokenizer's own Python code.
        null_tokenizer_eod_id: Id that ends a document; the last one if left out.
    """

    tokenizer_type: str
    tokenizer_model: str | None = None
    vocab_size: int | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    special_tokens: tuple[str, ...] | None = None
    tiktoken_pattern: Literal["v1", "v2"] | None = None
    tiktoken_num_special_tokens: int = 1000
    tokenizer_sentencepiece_legacy: bool = False
    tokenizer_sentencepiece_ignore_extra_whitespaces: bool = True
    tokenizer_hf_no_use_fast: bool = False
    tokenizer_hf_no_include_special_tokens: bool = False
    trust_remote_code: bool = False
    null_tokenizer_eod_id: int | None = None

    def existing_file(self, name: str, what: str, or_folder: bool = False) -> str:
        """Returns the path that an option names.

        Args:
            name: Of the option.
            what: What the file must be.
            or_folder: Whether a folder will do.

        Raises:
            ValueError: If the option is left out, or there is no such file.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"{name} (not given) must be {what} for {self.tokenizer_type}.")
        path = Path(value)
        if not path.exists():
            raise ValueError(f"{name} ({value}) does not exist. It must be {what}.")
        if path.is_dir() and not or_folder:
            inside = path / "tokenizer.model"
            found = self.tokenizer_type in SENTENCEPIECE and inside.exists()
            hint = f"Did you mean {inside}?" if found else f"It must be {what}."
            raise ValueError(f"{name} ({value}) is a folder. {hint}")
        return os.fspath(path)


_HUGGING_FACE = {
    "special_tokens",
    "tokenizer_hf_no_use_fast",
    "tokenizer_hf_no_include_special_tokens",
    "trust_remote_code",
}
# The options that a type reads; every other must have its default.
READ_BY: dict[str, set[str]] = {
    **{
        kind: {"tokenizer_model", "tokenizer_sentencepiece_ignore_extra_whitespaces"}
        for kind in SENTENCEPIECE
    },
    "HuggingFaceTokenizer": {"tokenizer_model", *_HUGGING_FACE},
    "TikTokenizer": {
        "tokenizer_model",
        "vocab_size",
        "special_tokens",
        "tiktoken_pattern",
        "tiktoken_num_special_tokens",
    },
    "GPT2BPETokenizer": {"vocab_file", "merge_file", *_HUGGING_FACE},
    "NullTokenizer": {"vocab_size", "null_tokenizer_eod_id"},
}
# Why an option is refused, where "another type reads it" would not help.
REASONS = {
    "vocab_size": "its model says it",
    "tokenizer_sentencepiece_legacy": (
        "Megatron's own has no eod then. Train the special tokens into the model instead"
    ),
    "special_tokens": "train them into the model instead",
}
# Flags of Megatron's parser on which the ids do not depend: they belong to training.
TRAINING_ONLY: dict[tuple[str, ...], dict[str, Any]] = {
    ("--padded-vocab-size",): {"type": int},
    ("--no-pad-vocab-size", "--disable-pad-vocab-size"): {"action": "store_const", "const": True},
    ("--vocab-extra-ids",): {"type": int},
    ("--null-tokenizer-pad-id",): {"type": int},
    ("--chat-template",): {},
}


# Options whose flags have other names.
RENAMED = {
    "tokenizer_sentencepiece_ignore_extra_whitespaces": (
        "--no-tokenizer-sentencepiece-ignore-extra-whitespaces",
        "--disable-tokenizer-sentencepiece-ignore-extra-whitespaces",
    ),
    "special_tokens": ("--tokenizer-special-tokens",),
}


def check_tokenizer_options(options: TokenizerOptions) -> None:
    """Refuses a type that is not supported, and every option that its type does not read.

    Raises:
        ValueError: Naming the option, its value and who reads it.
    """
    kind = options.tokenizer_type
    if kind not in SUPPORTED:
        raise ValueError(
            f"tokenizer_type ({kind}) must be one of {', '.join(SUPPORTED)}. Megatron's other "
            "types are for BERT, images or chat data, which this tool does not write."
        )
    for field in fields(options):
        value = getattr(options, field.name)
        if field.default is MISSING or value == field.default or field.name in READ_BY[kind]:
            continue
        readers = [name for name in SUPPORTED if field.name in READ_BY[name]]
        reason = REASONS.get(field.name)
        if field.name == "special_tokens" and kind == "NullTokenizer":
            reason = None
        why = f": {reason}" if reason else ""
        whose = f" It belongs to {', '.join(readers)}." if readers else ""
        shown = " ".join(value) if isinstance(value, tuple) else value
        raise ValueError(f"{field.name} ({shown}) must be left out with {kind}{why}.{whose}")


def add_tokenizer_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds the tokenizer flags to a tool, by Megatron's names. See `take_tokenizer_options`."""
    group = parser.add_argument_group("tokenizer")
    kind = {"required": required, "help": f"One of {', '.join(SUPPORTED)}."}
    further = {name: {"flags": flags} for name, flags in RENAMED.items()}
    names = [field.name for field in fields(TokenizerOptions)]
    add_flags_of(group, TokenizerOptions, *names, tokenizer_type=kind, **further)
    group.add_argument(
        "--vocab", help="Old name of --vocab-file, or of --tokenizer-model where the type has that."
    )
    group.add_argument("--tokenizer-metadata", help="Refused: --tokenizer-type says it all.")
    for flags, how in TRAINING_ONLY.items():
        group.add_argument(*flags, help="Training's; the ids do not depend on it.", **how)


def take_tokenizer_options(arguments: dict[str, Any]) -> TokenizerOptions:
    """Takes the tokenizer flags out of parsed arguments; what is left belongs to the tool.

    Notes about old names and about flags that change nothing go to stderr, one line each.

    Args:
        arguments: `vars` of what a parser with `add_tokenizer_arguments` returned. Changed.

    Raises:
        ValueError: If flags contradict each other, or the type does not read one that is given.
    """
    for flag, *_ in TRAINING_ONLY:
        if arguments.pop(flag[2:].replace("-", "_")) is not None:
            _note(f"{flag} changes nothing in the data; give it to training.")
    metadata = arguments.pop("tokenizer_metadata")
    if metadata is not None:
        raise ValueError(
            f"tokenizer_metadata ({metadata}) must be left out: it may name a class of its own, "
            "which is not run here. Use --tokenizer-type."
        )
    old = arguments.pop("vocab")
    if old is not None:
        reads = READ_BY.get(arguments["tokenizer_type"], set())
        name = "vocab_file" if "vocab_file" in reads else "tokenizer_model"
        if arguments[name] is not None:
            raise ValueError(
                f"vocab ({old}) must be left out when {name} ({arguments[name]}) is given: it is "
                f"the old name of --{name.replace('_', '-')}."
            )
        _note(f"--vocab is the old name of --{name.replace('_', '-')}.")
        arguments[name] = old
    values = {field.name: arguments.pop(field.name) for field in fields(TokenizerOptions)}
    if values["special_tokens"] is not None:
        values["special_tokens"] = tuple(values["special_tokens"])
    options = TokenizerOptions(**values)
    check_tokenizer_options(options)
    return options


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
