"""A SentencePiece model as a `tokenizers` pipeline that gives the same ids.

What must agree is what sentencepiece's own `encode` returns, which is what Megatron's
SentencePieceTokenizer writes into the data: strings such as "</s>" in the text are text, not the
special token, and nothing is added at either end. Features that cannot be carried over exactly are
refused; what users of the pipeline must still do is compare it on the texts of this module.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SPACE = "\u2581"  # what sentencepiece writes for a space
SAMPLE_TEXTS = (
    "",
    " ",
    "\n",
    "Hello world",
    " leading and trailing ",
    "two  spaces,   three,        many",
    "line one\nline two\n\n\n  indented\r\n\ttabbed\u00a0no-break\u3000wide\u200bzero",
    "caf\u00e9 cafe\u0301 \ufb01ne \u00bd \u2167 \uff21\uff22 na\u00efve \u0130stanbul \u00df",
    "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001d54f",
    "<s> </s> <unk> <pad> <0x41> [INST] <|endoftext|> </s></s>",
    f"{SPACE} {SPACE}{SPACE}written out{SPACE}",
    "aaaaaaaaaaaaaaa aaaa abababab .......... ---- ======= 1234567890 00000",
    "\x00\x01\x1f\x7f\x85\ufeff\ufffd\U0010ffff",
)


class NotConvertibleError(ValueError):
    """The model has a feature that cannot be carried over; the message names it."""


def read_proto(model: Path) -> Any:
    """Returns the model file as sentencepiece's ModelProto."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.read_bytes())
    return proto


def build_pipeline(proto: Any) -> Any:
    """Builds the `tokenizers.Tokenizer` that encodes as the model does.

    Control and unknown pieces are in its vocabulary but match no text.

    Args:
        proto: ModelProto of type bpe or unigram.

    Raises:
        NotConvertibleError: If the model has a feature that cannot be carried over.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers

    spec = proto.normalizer_spec
    feature = find_unconvertible(proto)
    if feature is not None:
        raise NotConvertibleError(feature)
    tokenizer = Tokenizer(_model(proto))
    tokenizer.normalizer = normalizers.Sequence(_normalizers(spec))
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        decoding.append(decoders.Strip(" ", 1 << 30 if spec.remove_extra_whitespaces else 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    tokenizer.add_tokens(
        [AddedToken(piece, normalized=False) for piece in user_defined_pieces(proto)]
    )
    return tokenizer


def find_unconvertible(proto: Any) -> str | None:
    """Returns the feature of a model that `build_pipeline` refuses, or None."""
    spec, kinds = proto.normalizer_spec, _kinds(proto)
    refused = {
        "treat_whitespace_as_suffix": proto.trainer_spec.treat_whitespace_as_suffix,
        "escape_whitespaces=False": not spec.escape_whitespaces,
        # tokenizers applies such a table by grapheme, sentencepiece by character
        f"normalisation {spec.name!r}": bool(spec.precompiled_charsmap),
        "model_type": proto.trainer_spec.model_type not in (1, 2),
        "unused pieces": any(piece.type == kinds.UNUSED for piece in proto.pieces),
    }
    return next((feature for feature, present in refused.items() if present), None)


def user_defined_pieces(proto: Any) -> list[str]:
    """Returns the pieces that match as they stand, in the order of their ids."""
    return [p.piece for p in proto.pieces if p.type == _kinds(proto).USER_DEFINED]


def control_pieces(proto: Any) -> list[str]:
    """Returns the control and unknown pieces, in the order of their ids."""
    kinds = _kinds(proto)
    return [p.piece for p in proto.pieces if p.type in (kinds.CONTROL, kinds.UNKNOWN)]


def unknown_piece(proto: Any) -> str:
    """Returns the piece for what the vocabulary cannot spell."""
    kinds = _kinds(proto)
    return next(p.piece for p in proto.pieces if p.type == kinds.UNKNOWN)


def _kinds(proto: Any) -> Any:
    return type(proto).SentencePiece


def _model(proto: Any) -> Any:
    from tokenizers import models

    kinds, fallback = _kinds(proto), proto.trainer_spec.byte_fallback
    of_text = (kinds.NORMAL, kinds.USER_DEFINED)
    if proto.trainer_spec.model_type == 2:
        ranked = sorted((p for p in proto.pieces if p.type in of_text), key=lambda p: -p.score)
        return models.BPE(
            vocab={piece.piece: n for n, piece in enumerate(proto.pieces)},
            merges=list(_merges([piece.piece for piece in ranked])),
            unk_token=unknown_piece(proto),
            fuse_unk=True,
            byte_fallback=fallback,
        )
    # pieces that text never yields (specials, bytes) must lose against any other reading
    scores = [(p.piece, p.score if p.type in of_text else -1e4) for p in proto.pieces]
    return models.Unigram(scores, proto.trainer_spec.unk_id, fallback)


def _normalizers(spec: Any) -> list[Any]:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" +"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]


def _merges(pieces: list[str]) -> Iterator[tuple[str, str]]:
    """Yields every pair that makes a piece, best piece first: rank stands for the score.

    Of several pairs for one piece sentencepiece takes the leftmost in the text; a rank cannot say
    that, but it matters only where two overlap, which merging in order of score does not leave.
    """
    known = set(pieces)
    for piece in pieces:
        cuts = range(1, len(piece))
        yield from ((piece[:n], piece[n:]) for n in cuts if {piece[:n], piece[n:]} <= known)


def random_texts(pieces: Sequence[str], count: int, seed: int) -> Iterator[str]:
    """Yields texts that are concatenations of pieces of a vocabulary, some with many repeats.

    Args:
        pieces: Strings, spaces written as spaces.
        count: Number of texts.
        seed: Of the choice.
    """
    generator = random.Random(seed)
    few = generator.sample(pieces, min(20, len(pieces)))  # repeats and overlaps come up often
    for n in range(count):
        pool = few if n % 3 == 0 else pieces
        parts = generator.choices(pool, k=generator.randint(1, 12))
        if n % 5 == 0:
            parts.insert(0, chr(generator.choice((0xE9, 0x4E2D, 0x1F600, 9, 10, 32))))
        yield "".join(parts)
