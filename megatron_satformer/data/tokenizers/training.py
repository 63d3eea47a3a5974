"""Trains a tokenizer on the inputs of preprocess_data.py, for use with Megatron's flags."""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megatron_satformer.data.reading.documents import read_documents
from megatron_satformer.data.reading.inputs import find_inputs
from megatron_satformer.data.tokenizers.byte_level_training import (
    FIXED_TOKENS,
    tokenizer_config,
    train_byte_level,
)
from megatron_satformer.data.tokenizers.sentencepiece_training import (
    FIXED_PIECES,
    readable_vocabulary,
    train_sentencepiece,
)
from megatron_satformer.data.tokenizers.text_sample import sample_documents
from megatron_satformer.files.atomic import AtomicFile

TYPES = ("SentencePieceTokenizer", "HuggingFaceTokenizer")


@dataclass(frozen=True)
class TrainedTokenizer:
    """What was trained.

    Attributes:
        model: What --tokenizer-model wants: a .model file, or a folder for HuggingFaceTokenizer.
        vocab_size: Its size.
        documents: Documents it learned from, after sampling.
        text_bytes: Their bytes in UTF-8.
        seconds: What it took.
    """

    model: Path
    vocab_size: int
    documents: int
    text_bytes: int
    seconds: float


@dataclass
class _Count:
    documents: int = 0
    text_bytes: int = 0

    def texts(self, documents: Iterable[list[str]]) -> Iterator[str]:
        """Yields the texts of all documents and counts both."""
        for texts in documents:
            self.documents += 1
            self.text_bytes += sum(len(text.encode("utf-8")) for text in texts)
            yield from texts


def train_tokenizer(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    vocab_size: int,
    json_keys: Sequence[str] = ("text",),
    overwrite: bool = False,
    tokenizer_type: str = "SentencePieceTokenizer",
    max_bytes: int | None = None,
    document_separator: str | None = None,
) -> TrainedTokenizer:
    """Trains a tokenizer on the text of the inputs and writes its files.

    The same input gives the same files. SentencePiece holds the text in memory, byte-level BPE the
    different words: for a large corpus, give `max_bytes`.

    Args:
        inputs: Files, globs, folders or "-", as `find_inputs` takes them.
        output: A folder, for tokenizer.model and tokenizer.vocab or for tokenizer.json and
            tokenizer_config.json; for SentencePieceTokenizer also a name ending in .model.
        vocab_size: Number of ids, all included.
        json_keys: Keys whose text is used.
        overwrite: Replace an existing tokenizer.
        tokenizer_type: As Megatron calls it.
        max_bytes: Learn from a random sample of documents of this many bytes together; all if left
            out. SentencePiece holds what it learns from in memory, several times over.
        document_separator: What stands between two documents of a .txt file.

    Raises:
        ValueError: If an input is bad, the output exists, or the vocabulary does not fit the text.
    """
    start = time.perf_counter()
    _check_sizes(tokenizer_type, vocab_size, max_bytes)
    paths = _output_paths(Path(output), tokenizer_type, overwrite)
    sources = find_inputs(inputs, document_separator)
    count = _Count()
    with ExitStack() as stack:
        outputs = [stack.enter_context(AtomicFile(path)) for path in paths]
        documents: Iterable[list[str]] = read_documents(sources, json_keys, document_separator)
        if max_bytes is not None:
            documents = sample_documents(iter(documents), max_bytes)
        parts = _train(count.texts(documents), vocab_size, tokenizer_type)
        for file, part in zip(outputs, parts, strict=True):
            file.file.write(part)
            file.seal()
        # The model last: where it is, all of it is.
        for file in reversed(outputs):
            file.publish()
    seconds = time.perf_counter() - start
    model = paths[0] if tokenizer_type == "SentencePieceTokenizer" else paths[0].parent
    return TrainedTokenizer(model, vocab_size, count.documents, count.text_bytes, seconds)


def _check_sizes(tokenizer_type: str, vocab_size: int, max_bytes: int | None) -> None:
    if tokenizer_type not in TYPES:
        raise ValueError(f"tokenizer_type ({tokenizer_type}) must be one of {', '.join(TYPES)}.")
    fixed, what = (
        (FIXED_PIECES, "3 special pieces")
        if tokenizer_type == "SentencePieceTokenizer"
        else (FIXED_TOKENS, "the end of a document")
    )
    if vocab_size <= fixed:
        raise ValueError(
            f"vocab_size ({vocab_size}) must be more than {fixed}: {what} and 256 bytes come "
            "first. 4096 suits a few MB of text, 32000 a few GB."
        )
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes ({max_bytes}) must be at least 1. Some hundred MB are enough.")


def _output_paths(output: Path, tokenizer_type: str, overwrite: bool) -> tuple[Path, Path]:
    """Returns the two files to write, the one that others wait for first."""
    if tokenizer_type == "SentencePieceTokenizer":
        model = output if output.suffix == ".model" else output / "tokenizer.model"
        paths = (model, model.with_suffix(".vocab"))
    elif output.suffix in (".model", ".json") or output.is_file():
        raise ValueError(
            f"output ({output}) must be a folder with HuggingFaceTokenizer: it gets two files."
        )
    else:
        paths = (output / "tokenizer.json", output / "tokenizer_config.json")
    for path in paths:
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists already. Pass --overwrite, or choose another output.")
    return paths


def _train(texts: Iterator[str], vocab_size: int, tokenizer_type: str) -> tuple[bytes, bytes]:
    if tokenizer_type == "HuggingFaceTokenizer":
        return train_byte_level(texts, vocab_size), tokenizer_config()
    model = train_sentencepiece(texts, vocab_size)
    return model, readable_vocabulary(model)
