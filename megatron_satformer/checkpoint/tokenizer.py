"""Gives an exported folder the tokenizer that the training data was made with, id for id.

A SentencePiece model becomes a `tokenizers` pipeline that AutoTokenizer loads without further
packages. What must agree is what sentencepiece's own `encode` returns, which is what Megatron's
SentencePieceTokenizer writes into the data: strings such as "</s>" in the text are text, not the
special token, and nothing is added at either end. Each export is checked on thousands of texts;
a model that cannot be carried over exactly is refused.
"""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_satformer.data.tokenizers.sentencepiece_pipeline import (
    SAMPLE_TEXTS,
    SPACE,
    NotConvertibleError,
    build_pipeline,
    control_pieces,
    random_texts,
    read_proto,
    unknown_piece,
)

WAY_OUT = "Pass --tokenizer with a Hugging Face tokenizer folder, or --tokenizer none."


def build_from_sentencepiece(model: Path) -> PreTrainedTokenizerFast:
    """Builds the transformers tokenizer that encodes as the SentencePiece model does.

    Args:
        model: A SentencePiece .model file of type bpe or unigram.

    Raises:
        ValueError: If the model has a feature that cannot be carried over.
    """
    from tokenizers import AddedToken

    proto = read_proto(model)
    try:
        tokenizer = build_pipeline(proto)
    except NotConvertibleError as feature:
        raise ValueError(
            f"tokenizer ({model}) has {feature}, which cannot be exported exactly. {WAY_OUT}"
        ) from None
    tokenizer.add_special_tokens(
        [AddedToken(piece, normalized=False) for piece in control_pieces(proto)]
    )
    unk = unknown_piece(proto)
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
    pieces = [processor.id_to_piece(n).replace(SPACE, " ") for n in range(len(processor))]
    texts = [*SAMPLE_TEXTS, *random_texts(pieces, count, seed)]
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
