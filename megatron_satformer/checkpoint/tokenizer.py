"""Gives an exported folder the tokenizer that the training data was made with, id for id.

A SentencePiece model becomes a `tokenizers` pipeline that AutoTokenizer loads without further
packages. What must agree is what sentencepiece's own `encode` returns, which is what Megatron's
SentencePieceTokenizer writes into the data: strings such as "</s>" in the text are text, not the
special token, and nothing is added at either end. Each export is checked on thousands of texts;
a model that cannot be carried over exactly is refused.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

SPACE = "\u2581"  # what sentencepiece writes for a space
WAY_OUT = "Pass --tokenizer with a Hugging Face tokenizer folder, or --tokenizer none."
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


def build_from_sentencepiece(model: Path) -> PreTrainedTokenizerFast:
    """Builds the transformers tokenizer that encodes as the SentencePiece model does.

    Args:
        model: A SentencePiece .model file of type bpe or unigram.

    Raises:
        ValueError: If the model has a feature that cannot be carried over.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.read_bytes())
    spec, kinds = proto.normalizer_spec, sentencepiece_model_pb2.ModelProto.SentencePiece
    refused = {
        "treat_whitespace_as_suffix": proto.trainer_spec.treat_whitespace_as_suffix,
        "escape_whitespaces=False": not spec.escape_whitespaces,
        # tokenizers applies such a table by grapheme, sentencepiece by character
        f"normalisation {spec.name!r}": bool(spec.precompiled_charsmap),
        "model_type": proto.trainer_spec.model_type not in (1, 2),
        "unused pieces": any(piece.type == kinds.UNUSED for piece in proto.pieces),
    }
    for feature, present in refused.items():
        if present:
            raise ValueError(
                f"tokenizer ({model}) has {feature}, which cannot be exported exactly. {WAY_OUT}"
            )

    unk = next(piece.piece for piece in proto.pieces if piece.type == kinds.UNKNOWN)
    fallback = proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == 2:
        text_kinds = (kinds.NORMAL, kinds.USER_DEFINED)
        ranked = sorted(
            (piece for piece in proto.pieces if piece.type in text_kinds), key=lambda p: -p.score
        )
        backend: models.Model = models.BPE(
            vocab={piece.piece: n for n, piece in enumerate(proto.pieces)},
            merges=list(_merges([piece.piece for piece in ranked])),
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=fallback,
        )
    else:
        # pieces that text never yields (specials, bytes) must lose against any other reading
        scores = [
            (p.piece, p.score if p.type in (kinds.NORMAL, kinds.USER_DEFINED) else -1e4)
            for p in proto.pieces
        ]
        backend = models.Unigram(scores, proto.trainer_spec.unk_id, fallback)
    tokenizer = Tokenizer(backend)

    steps: list[Any] = []
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" +"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        decoding.append(decoders.Strip(" ", 1 << 30 if spec.remove_extra_whitespaces else 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)

    for piece in proto.pieces:
        token = AddedToken(piece.piece, normalized=False)
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN):
            tokenizer.add_special_tokens([token])
        elif piece.type == kinds.USER_DEFINED:
            tokenizer.add_tokens([token])

    names = {
        name: proto.pieces[index].piece
        for name in ("bos", "eos", "pad")
        if (index := getattr(proto.trainer_spec, f"{name}_id")) >= 0
    }
    names.setdefault("pad", names.get("eos", unk))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        **{f"{name}_token": piece for name, piece in names.items()},
        split_special_tokens=True,  # "</s>" in a text is text
        clean_up_tokenization_spaces=False,
        add_prefix_space=False,
        padding_side="left",
    )


def _merges(pieces: list[str]) -> Iterator[tuple[str, str]]:
    """Yields every pair that makes a piece, best piece first: rank stands for the score.

    Of several pairs for one piece sentencepiece takes the leftmost in the text; a rank cannot say
    that, but it matters only where two overlap, which merging in order of score does not leave.
    """
    known = set(pieces)
    for piece in pieces:
        cuts = range(1, len(piece))
        yield from ((piece[:n], piece[n:]) for n in cuts if {piece[:n], piece[n:]} <= known)


def check_same_ids(tokenizer: Any, model: Path, count: int = 3000, seed: int = 0) -> int:
    """Compares ids and text with sentencepiece's own on awkward and on random texts.

    Args:
        tokenizer: A transformers tokenizer.
        model: The SentencePiece model it stands for.
        count: Number of random texts, concatenations of the model's own pieces and bytes.
        seed: Of the random texts.

    Returns:
        Number of texts compared.

    Raises:
        ValueError: On the first text whose ids, or whose ids' text, differ.
    """
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(model))
    if len(tokenizer) != processor.get_piece_size():
        raise ValueError(
            f"tokenizer ({model}) has {processor.get_piece_size()} pieces, exported "
            f"{len(tokenizer)}: two of them are equal."
        )
    texts = [*SAMPLE_TEXTS, *_random_texts(processor, count, seed)]
    for text in texts:
        expected = processor.encode(text)
        actual = tokenizer.encode(text, add_special_tokens=False)
        if actual != expected:
            raise ValueError(
                f"tokenizer ({model}) cannot be exported exactly: {text!r} gives {expected} in "
                f"sentencepiece and {actual} in the exported tokenizer. {WAY_OUT}"
            )
        if processor.unk_id() not in expected:
            decoded = tokenizer.decode(expected, skip_special_tokens=True)
            if decoded != processor.decode(expected):
                raise ValueError(
                    f"tokenizer ({model}) cannot be exported exactly: {expected} is the text "
                    f"{processor.decode(expected)!r} in sentencepiece and {decoded!r} in the "
                    f"exported tokenizer. {WAY_OUT}"
                )
    return len(texts)


def _random_texts(processor: Any, count: int, seed: int) -> Iterator[str]:
    generator = random.Random(seed)
    pieces = [processor.id_to_piece(n).replace(SPACE, " ") for n in range(len(processor))]
    few = generator.sample(pieces, min(20, len(pieces)))  # repeats and overlaps come up often
    for n in range(count):
        pool = few if n % 3 == 0 else pieces
        parts = generator.choices(pool, k=generator.randint(1, 12))
        if n % 5 == 0:
            parts.insert(0, chr(generator.choice((0xE9, 0x4E2D, 0x1F600, 9, 10, 32))))
        yield "".join(parts)


def export_tokenizer(source: Path, folder: Path) -> Any:
    """Writes the tokenizer's files into `folder` and returns the tokenizer as loaded from there.

    Args:
        source: A SentencePiece .model file, or a folder that AutoTokenizer loads.
        folder: An existing folder.

    Raises:
        ValueError: If the source is neither, or cannot be exported exactly.
    """
    if source.is_dir():
        tokenizer = _load(source)
        tokenizer.save_pretrained(folder)
        return tokenizer
    build_from_sentencepiece(source).save_pretrained(folder)
    tokenizer = _load(folder)
    check_same_ids(tokenizer, source)
    return tokenizer


def _load(folder: Path) -> Any:
    # False, not left out: transformers would ask the terminal
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
