"""Trains a tokenizer on the inputs of preprocess_data.py, for use with Megatron's flags."""

import heapq
import io
import json
import os
import random
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megatron_satformer.data.reading.documents import read_documents
from megatron_satformer.data.reading.inputs import find_inputs
from megatron_satformer.files.atomic import AtomicFile

TYPES = ("SentencePieceTokenizer", "HuggingFaceTokenizer")
# unk, bos, eos and one piece for each byte.
FIXED_PIECES = 3 + 256
# Text is handed over line by line, each with the line ends before it: those after it SentencePiece
# drops, and would never learn a piece for. So a piece may start with line ends, and spans none.
LINE = re.compile(r"\n*[^\n]+")
# Of the byte-level BPE tokenizer: `<|endoftext|>` is 0 (eos, Megatron's eod), the 256 bytes follow,
# then merges. Text is cut by the regex of Llama 3: words with the space before them, at most three
# digits, line ends by themselves.
END = "<|endoftext|>"
# The end and the bytes.
FIXED_TOKENS = 1 + 256
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END,
    "clean_up_tokenization_spaces": False,
    "model_max_length": int(1e30),
}


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
    on_unknown: str = "error",
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
        on_unknown: error where a folder or glob holds a file of a kind that is not read, or skip.

    Raises:
        ValueError: If an input is bad, the output exists, or the vocabulary does not fit the text.
    """
    start = time.perf_counter()
    _check_sizes(tokenizer_type, vocab_size, max_bytes)
    paths = _output_paths(Path(output), tokenizer_type, overwrite)
    sources = find_inputs(inputs, document_separator, on_unknown).sources
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
        return train_byte_level(texts, vocab_size), f"{json.dumps(CONFIG, indent=2)}\n".encode()
    model = train_sentencepiece(texts, vocab_size)
    return model, readable_vocabulary(model)


def train_sentencepiece(texts: Iterator[str], vocab_size: int) -> bytes:
    """Trains a SentencePiece BPE such that text comes back exactly; same texts, same bytes.

    It has unk 0, `<s>` 1, `</s>` 2 (Megatron's eod), no pad, then the 256 bytes, then pieces. Holds
    all the text in memory.

    Args:
        texts: What to learn from.
        vocab_size: Number of pieces, all included.

    Raises:
        ValueError: If the vocabulary does not fit the text, or `texts` raises it.
    """
    from sentencepiece import SentencePieceTrainer

    # SentencePiece swallows an exception of its iterator and trains on what came before: keep it.
    failure: list[ValueError] = []

    def guarded() -> Iterator[str]:
        try:
            for text in texts:
                yield from LINE.findall(text)
        except ValueError as error:
            failure.append(error)

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=guarded(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            # The tokenizer must give back what it was given: no folding of unicode (NFKC would turn
            # "½" into "1/2"), every space and newline kept, and what has no piece spelled in bytes,
            # not unk.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            byte_fallback=True,
            # No space is put before the text: otherwise a text that starts with a space and one
            # that does not differ by more than that space, and text taken up in the middle of a
            # word goes wrong.
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            # Characters rarer than this share are left to bytes.
            character_coverage=0.9995,
            # Longer lines would be skipped in silence. 4192 is the default, a prose paragraph is
            # longer.
            max_sentence_length=1 << 30,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if not failure:
            raise ValueError(_explain_sentencepiece(str(error), vocab_size)) from None
    if failure:
        raise failure[0]
    return model.getvalue()


def _explain_sentencepiece(message: str, vocab_size: int) -> str:
    most = re.search(r"value <= (\d+)", message)
    if most:
        return (
            f"vocab_size ({vocab_size}) must be at most {most[1]} for this much text. Give more "
            "text, or a smaller vocabulary."
        )
    least = re.search(r"required_chars\. (\d+) vs (\d+)", message)
    if least:
        return (
            f"vocab_size ({vocab_size}) must be at least {least[2]}: the text has that many "
            "pieces by its characters and bytes alone."
        )
    if "sentences_.empty()" in message or "!sentences" in message:
        return "input must hold some text; every document is empty."
    return f"SentencePiece cannot train on this input: {message.strip()}"


def readable_vocabulary(model: bytes) -> bytes:
    """Returns the pieces of a model with their scores, a line each, in the order of their ids."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_proto=model)
    rows = (
        f"{pieces.id_to_piece(index)!r}\t{pieces.get_score(index):g}\n"
        for index in range(pieces.get_piece_size())
    )
    return "".join(rows).encode("utf-8")


def train_byte_level(texts: Iterator[str], vocab_size: int) -> bytes:
    """Trains a byte-level BPE such that text comes back exactly; same texts, same bytes.

    Returns its tokenizer.json. Memory goes by the number of different words, not by the text.

    Args:
        texts: What to learn from.
        vocab_size: Number of tokens, all included.

    Raises:
        ValueError: If the vocabulary is too large for the text, or `texts` raises it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    size = tokenizer.get_vocab_size()
    if size == FIXED_TOKENS:
        raise ValueError("input must hold some text; there is nothing to learn from.")
    if size < vocab_size:
        raise ValueError(
            f"vocab_size ({vocab_size}) must be at most {size} for this much text. Give more "
            "text, or a smaller vocabulary."
        )
    return tokenizer.to_str(pretty=True).encode("utf-8")


def sample_documents(
    documents: Iterator[list[str]], max_bytes: int, seed: int = 0
) -> list[list[str]]:
    """Returns a sample that every document has the same chance to be in, in the stream's order.

    Each document draws a number, and the smallest numbers win as long as they fit in together. The
    whole stream is read; at no time is more than `max_bytes` and one document held. The same stream
    gives the same sample.

    Args:
        documents: The stream; a document is a list of texts.
        max_bytes: Most bytes of UTF-8 in the sample. A document larger than that is never in it.
        seed: Of the numbers.
    """
    generator = random.Random(seed)
    # The largest number is on top: the first to go.
    heap: list[tuple[float, int, int, list[str]]] = []
    held, limit = 0, 1.0
    for place, texts in enumerate(documents):
        number = generator.random()
        size = sum(len(text.encode("utf-8")) for text in texts)
        if number >= limit or size > max_bytes:
            continue
        heapq.heappush(heap, (-number, place, size, texts))
        held += size
        while held > max_bytes:
            largest, _, freed, _ = heapq.heappop(heap)
            held -= freed
            # Whatever draws more from here on would have gone too.
            limit = -largest
    return [texts for _, _, _, texts in sorted(heap, key=lambda entry: entry[1])]
