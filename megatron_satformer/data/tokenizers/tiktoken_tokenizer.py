"""Megatron's TikTokenizer: a byte-level BPE vocabulary in JSON, special tokens in front."""

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_satformer.data.tokenizers.options import TIKTOKEN_VOCAB_SIZE, TokenizerOptions

# What the two names of --tiktoken-pattern stand for. Source: megatron/core/tokenizers/text/
# libraries/tiktoken_tokenizer.py; a character more or less would change the ids.
_V2_TAIL = r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERNS = {
    "v1": (
        r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    "v2": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_V2_TAIL}"
    ),
}
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")


class TikTokenizer:
    """A vocabulary as Megatron's TikTokenizer reads it; `eod` is `</s>`.

    Ids 0 to tiktoken_num_special_tokens - 1 are the special tokens, those without a name being
    `<SPECIAL_n>`; the vocabulary follows, best merge first, as far as vocab_size reaches. The name
    of a special token in a text is that token, as in Megatron.

    Args:
        options: The flags. The model is a JSON list of {"rank", "token_bytes" (base64),
            "token_str"}; the first 256 are the bytes.

    Raises:
        ValueError: If the file is not such a list or the sizes do not fit.
    """

    def __init__(self, options: TokenizerOptions) -> None:
        from tiktoken import Encoding

        model = options.existing_file("tokenizer_model", "a TikToken vocabulary, a .json file")
        size = TIKTOKEN_VOCAB_SIZE if options.vocab_size is None else options.vocab_size
        count = options.tiktoken_num_special_tokens
        names = _special_tokens(options.special_tokens, count, size)
        ranks = _read_ranks(model)
        if len(ranks) + count < size:
            raise ValueError(
                f"vocab_size ({size}) must be at most {len(ranks) + count}: tokenizer_model "
                f"({model}) has {len(ranks)} tokens, and tiktoken_num_special_tokens ({count}) "
                f"come in front. Pass --vocab-size {len(ranks) + count}."
            )
        self.vocab_size = size
        self.eod: int | None = names.index("</s>")
        self.encoding = Encoding(
            name=Path(model).stem,
            pat_str=PATTERNS[options.tiktoken_pattern or "v2"],
            mergeable_ranks={token: count + n for n, token in enumerate(ranks[: size - count])},
            special_tokens={name: n for n, name in enumerate(names)},
        )

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`."""
        return self.encoding.encode(text, allowed_special="all")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        return self.encoding.decode(list(ids))


def _special_tokens(given: Sequence[str] | None, count: int, size: int) -> list[str]:
    named = list(SPECIAL_TOKENS if given is None else given)
    missing = [name for name in SPECIAL_TOKENS if name not in named]
    names = named + [f"<SPECIAL_{n}>" for n in range(len(named), count)]
    if missing or len(set(names)) != len(names):
        raise ValueError(
            f"special_tokens ({' '.join(named)}) must be different names that include "
            f"{' '.join(SPECIAL_TOKENS)} for TikTokenizer. Leave them out for these seven."
        )
    if not len(named) <= count < size - 256:
        raise ValueError(
            f"tiktoken_num_special_tokens ({count}) must be at least {len(named)}, the number of "
            f"special tokens, and leave room for more than 256 ids below vocab_size ({size})."
        )
    return names


def _read_ranks(model: str) -> list[bytes]:
    """Returns the tokens in the order of their ranks."""
    problem = ""
    try:
        rows = json.loads(Path(model).read_text("utf-8"))
        tokens = [base64.b64decode(row["token_bytes"], validate=True) for row in rows]
        if [row["rank"] for row in rows] != list(range(len(rows))):
            problem = "its ranks must count from 0"
        elif tokens[:256] != [bytes([n]) for n in range(256)]:
            problem = "its first 256 tokens must be the 256 bytes"
        elif len(set(tokens)) != len(tokens):
            problem = "two of its tokens are equal"
        elif any(set(row) != {"rank", "token_bytes", "token_str"} for row in rows):
            problem = "each entry must have rank, token_bytes and token_str, and no more"
    except (json.JSONDecodeError, UnicodeDecodeError, binascii.Error, TypeError, KeyError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise ValueError(
            f"tokenizer_model ({model}) must be a TikToken vocabulary as Megatron reads it, a JSON "
            f"list of rank, token_bytes and token_str: {problem}."
        )
    return tokens
