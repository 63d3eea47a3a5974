"""How many rows of a checkpoint's embedding are a vocabulary, and how many its padding.

The model says it, not the tokenizer that happens to be at hand: a run records it in its args, and
an import the size of the model imported. Must not know: tensors.
"""

import sys
from argparse import Namespace
from typing import NamedTuple

from megatron_satformer.checkpoint.hugging_face.origin import find_origin
from megatron_satformer.checkpoint.hugging_face.tokenizer_source import find_tokenizer
from megatron_satformer.data.tokenizers.exact import build_tokenizer

ARGUMENT = "model_vocab_size"
IMPORTED = ("HuggingFaceTokenizer", "NullTokenizer")  # types that an import has


class Vocabulary(NamedTuple):
    """Rows that are no padding, and the end of a document where the args or the tokenizer say."""

    size: int
    end: int | None


def record_vocabulary(args: Namespace, saved: Namespace | None, entries: int) -> None:
    """Notes in the args of a run how large its model's vocabulary is.

    That is the tokenizer's, or more where the run starts from a model of more, as Qwen's have them;
    the tokenizer that an imported model came with never changes it.

    Args:
        args: Of the run.
        saved: Of the checkpoint that it starts from, if it does.
        entries: Of the run's tokenizer.
    """
    size = None if saved is None else known_size(saved)
    kept = size is not None and (size >= entries or _came_with(saved, entries))
    setattr(args, ARGUMENT, size if kept else entries)


def known_size(args: Namespace) -> int | None:
    """What a checkpoint's args say: by their record, or as an import of before it."""
    recorded: int | None = getattr(args, ARGUMENT, None)
    if recorded is None and getattr(args, "tokenizer_type", None) in IMPORTED:
        recorded = getattr(args, "vocab_size", None)
    return recorded


def find_vocabulary(args: Namespace, rows: int, entries: int | None) -> Vocabulary:
    """Finds the vocabulary to export.

    Args:
        args: Of the checkpoint.
        rows: Of its embedding, padding included.
        entries: Of the tokenizer that is exported with it; None without one.

    Raises:
        ValueError: If the embedding has fewer rows, or the tokenizer more entries than the model.
    """
    trained, size = _trained_with(args), getattr(args, ARGUMENT, None)
    if size is None and trained is not None:
        size = max(trained.size, known_size(args) or 0)
    if size is None and entries is None:
        print(
            f"note: the training tokenizer is not here to say how many of the {rows} rows of the "
            "embedding are padding: all are kept.",
            file=sys.stderr,
        )
        return Vocabulary(rows, None)
    what = "tokenizer" if size is None else "vocab_size of the checkpoint"
    size = size or entries
    assert size is not None
    if size > rows:
        raise ValueError(
            f"{what} has {size} entries, the checkpoint's embedding only {rows}: it is not the one "
            "that the model was trained with."
        )
    if entries is not None and entries > size and not _came_with(args, entries):
        raise ValueError(
            f"tokenizer has {entries} entries, the checkpoint's model only {size}: it is not the "
            "one that the model was trained with. Pass --tokenizer with that one, or none."
        )
    return Vocabulary(size, None if trained is None else trained.end)


def _came_with(args: Namespace | None, entries: int) -> bool:
    """Whether a model was imported with a tokenizer of so many entries, whatever its own size."""
    origin = None if args is None else find_origin(args)
    return origin is not None and origin.tokenizer[:1] == (entries,)


def _trained_with(args: Namespace) -> Vocabulary | None:
    """What the tokenizer of training says; None where it is not here."""
    if (args.tokenizer_type or "").startswith("Null"):
        end = getattr(args, "null_tokenizer_eod_id", None)
        return Vocabulary(args.vocab_size, args.vocab_size - 1 if end is None else end)
    try:
        options = find_tokenizer(args, None)
        tokenizer = None if options is None else build_tokenizer(options)
    except ValueError:
        return None
    return None if tokenizer is None else Vocabulary(tokenizer.vocab_size, tokenizer.eod)
