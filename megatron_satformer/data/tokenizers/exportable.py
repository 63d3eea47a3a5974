"""Whether a tokenizer can be exported exactly, told before anything is made with it."""

import json
from pathlib import Path
from typing import Any

from megatron_satformer.data.tokenizers.options import SENTENCEPIECE, TokenizerOptions
from megatron_satformer.data.tokenizers.sentencepiece_pipeline import (
    SPACE,
    find_unconvertible,
    read_proto,
    user_defined_pieces,
)

# Pieces named in a message.
_MOST = 3


def export_obstacle(options: TokenizerOptions) -> str | None:
    """Returns what of a tokenizer an exported one would not do alike, or None.

    None too where the package protobuf is missing, which export needs.
    """
    model = Path(options.tokenizer_model or "")
    if options.tokenizer_type in SENTENCEPIECE and model.is_file():
        try:
            return sentencepiece_obstacle(read_proto(model))
        except ImportError:
            return None
    if options.tokenizer_type == "HuggingFaceTokenizer" and options.trust_remote_code:
        config = (model if model.is_dir() else model.parent) / "tokenizer_config.json"
        if config.is_file() and "auto_map" in json.loads(config.read_text("utf-8")):
            return "Python code of its own"
    return None


def sentencepiece_obstacle(proto: Any) -> str | None:
    """Returns what of a SentencePiece model cannot be exported exactly, or None.

    A pipeline of `tokenizers` looks for user-defined pieces before it replaces spaces, adds one in
    front or drops some, sentencepiece afterwards.
    """
    feature = find_unconvertible(proto)
    if feature is not None:
        return feature
    pieces = user_defined_pieces(proto)
    spaces = [piece for piece in pieces if SPACE in piece or " " in piece]
    if spaces:
        return f"user-defined pieces with spaces ({_shown(spaces)})"
    spec = proto.normalizer_spec
    if pieces and (spec.add_dummy_prefix or spec.remove_extra_whitespaces):
        does = "puts a space in front" if spec.add_dummy_prefix else "drops repeated spaces"
        return f"user-defined pieces ({_shown(pieces)}), and {does}"
    return None


def export_warning(options: TokenizerOptions) -> str | None:
    """Returns what to tell whoever makes data or trains with such a tokenizer, or None."""
    obstacle = export_obstacle(options)
    if obstacle is None:
        return None
    return (
        f"tokenizer_model ({options.tokenizer_model}) has {obstacle}: training is exact, but the "
        "model cannot be exported with its tokenizer (only with --tokenizer none, or another "
        "tokenizer that you answer for). tools/train_tokenizer.py makes one that can be exported."
    )


def _shown(pieces: list[str]) -> str:
    more = f" and {len(pieces) - _MOST} more" if len(pieces) > _MOST else ""
    return ", ".join(map(repr, pieces[:_MOST])) + more
