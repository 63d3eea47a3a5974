"""Trains a SentencePiece BPE model such that text comes back exactly.

The model has unk 0, `<s>` 1, `</s>` 2 (Megatron's eod), no pad, then the 256 bytes, then pieces.
"""

import io
import re
from collections.abc import Iterator

# unk, bos, eos and one piece for each byte.
FIXED_PIECES = 3 + 256
# Text is handed over line by line, each with the line ends before it: those after it SentencePiece
# drops, and would never learn a piece for. So a piece may start with line ends, and spans none.
LINE = re.compile(r"\n*[^\n]+")


def train_sentencepiece(texts: Iterator[str], vocab_size: int) -> bytes:
    """Trains a model; the same texts give the same bytes. Holds all the text in memory.

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


def readable_vocabulary(model: bytes) -> bytes:
    """Returns the pieces of a model with their scores, a line each, in the order of their ids."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_proto=model)
    rows = (
        f"{pieces.id_to_piece(index)!r}\t{pieces.get_score(index):g}\n"
        for index in range(pieces.get_piece_size())
    )
    return "".join(rows).encode("utf-8")
