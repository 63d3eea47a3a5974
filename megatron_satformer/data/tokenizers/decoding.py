"""Tokens back to text, for the tools that show data; without tokenizer flags, the ids."""

import argparse
from typing import Any

import numpy.typing as npt

from megatron_satformer.data.tokenizers.exact import Tokenizer, build_tokenizer
from megatron_satformer.data.tokenizers.hugging_face import hide_torch
from megatron_satformer.data.tokenizers.options import (
    add_tokenizer_arguments,
    take_tokenizer_options,
)


def take_tokenizer(arguments: dict[str, Any]) -> Tokenizer | None:
    """Takes the tokenizer flags out of parsed arguments, and builds the tokenizer if one is named.

    Without --tokenizer-type, `vocab_size` stays: it is the tool's own.

    Args:
        arguments: `vars` of what a parser with `add_tokenizer_arguments` returned. Changed.

    Raises:
        ValueError: If the flags do not make a tokenizer.
    """
    if arguments["tokenizer_type"] is not None:
        hide_torch()
        return build_tokenizer(take_tokenizer_options(arguments))
    parser = argparse.ArgumentParser()
    add_tokenizer_arguments(parser, required=False)
    for name, default in vars(parser.parse_args([])).items():
        if name != "vocab_size" and arguments.pop(name) != default:
            raise ValueError(
                f"{name} must come with tokenizer_type, which is not given. Pass --tokenizer-type."
            )
    return None


def text_of(tokenizer: Tokenizer | None, tokens: npt.NDArray) -> str:
    """Returns the text of tokens, or their ids where there is no tokenizer.

    Raises:
        ValueError: If a token is outside the tokenizer's vocabulary.
    """
    ids: list[Any] = tokens.tolist()
    if tokenizer is None:
        return " ".join(map(str, ids))
    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
        bad = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(
            f"token {bad} must be in [0, {tokenizer.vocab_size}), the tokenizer's vocabulary: the "
            "data were made with another tokenizer. Pass that one."
        )
    return tokenizer.decode(ids)
