"""Trains a SentencePiece BPE model from JSON lines, such that text comes back exactly.

The model has unk 0, `<s>` 1, `</s>` 2 (Megatron's eod), no pad, then the 256 bytes, then pieces.
"""

import io
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megatron_satformer.data.atomic import AtomicFile
from megatron_satformer.data.documents import check_inputs, iterate_documents, read_chunks

# unk, bos, eos and one piece for each byte.
FIXED_PIECES = 3 + 256
# Text is handed over line by line, each with the line ends before it: those after it SentencePiece
# drops, and would never learn a piece for. So a piece may start with line ends, and spans none.
LINE = re.compile(r"\n*[^\n]+")


@dataclass(frozen=True)
class TrainedTokenizer:
    """What was trained: where it is, its size, the text it saw, and the seconds it took."""

    model: Path
    vocab_size: int
    documents: int
    text_bytes: int
    seconds: float


@dataclass
class _Count:
    documents: int = 0
    text_bytes: int = 0


def model_path(output: str | os.PathLike[str]) -> Path:
    """Returns the model file that `output` means: itself, or tokenizer.model in that folder."""
    path = Path(output)
    return path if path.suffix == ".model" else path / "tokenizer.model"


def train_tokenizer(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    vocab_size: int,
    json_keys: Sequence[str] = ("text",),
    overwrite: bool = False,
) -> TrainedTokenizer:
    """Trains a model on all the text of the inputs and writes it and its readable .vocab.

    The same input gives the same file. SentencePiece holds the text in memory: for a large corpus,
    give a sample.

    Args:
        inputs: JSON lines files.
        output: A folder, which gets tokenizer.model and tokenizer.vocab, or a name ending in
            .model.
        vocab_size: Number of pieces, all included.
        json_keys: Keys of a line whose text is used.
        overwrite: Whether an existing model may be replaced.

    Raises:
        ValueError: If an input is bad, the output exists, or the vocabulary does not fit the text.
    """
    start = time.perf_counter()
    files = check_inputs(inputs)
    if vocab_size <= FIXED_PIECES:
        raise ValueError(
            f"vocab_size ({vocab_size}) must be more than {FIXED_PIECES}: 3 special pieces and "
            "256 bytes come first. 4096 suits a few MB of text, 32000 a few GB."
        )
    model = model_path(output)
    paths = (model, model.with_suffix(".vocab"))
    for path in paths:
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists already. Pass --overwrite, or choose another output.")
    count = _Count()
    with ExitStack() as stack:
        outputs = [stack.enter_context(AtomicFile(path)) for path in paths]
        content = _train(_lines(files, json_keys, count), vocab_size)
        for file, part in zip(outputs, (content, _readable_vocabulary(content)), strict=True):
            file.file.write(part)
            file.seal()
        # The model last: where it is, all of it is.
        for file in reversed(outputs):
            file.publish()
    seconds = time.perf_counter() - start
    return TrainedTokenizer(model, vocab_size, count.documents, count.text_bytes, seconds)


def _lines(files: Sequence[Path], keys: Sequence[str], count: _Count) -> Iterator[str]:
    for chunk in read_chunks(files):
        for _, texts in iterate_documents(chunk, keys):
            count.documents += 1
            for text in texts:
                count.text_bytes += len(text.encode("utf-8"))
                yield from LINE.findall(text)


def _train(lines: Iterator[str], vocab_size: int) -> bytes:
    from sentencepiece import SentencePieceTrainer

    # SentencePiece swallows an exception of its iterator and trains on what came before: keep it.
    failure: list[ValueError] = []

    def guarded() -> Iterator[str]:
        try:
            yield from lines
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
            raise ValueError(_explain(str(error), vocab_size)) from None
    if failure:
        raise failure[0]
    return model.getvalue()


def _explain(message: str, vocab_size: int) -> str:
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


def _readable_vocabulary(model: bytes) -> bytes:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_proto=model)
    rows = (
        f"{pieces.id_to_piece(index)!r}\t{pieces.get_score(index):g}\n"
        for index in range(pieces.get_piece_size())
    )
    return "".join(rows).encode("utf-8")
