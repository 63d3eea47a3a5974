"""Words that are single tokens: of a tokenizer of text, or of one made of nothing else."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_satformer.data.tokenizers.exact import Tokenizer
from megatron_satformer.data.tokenizers.training import CONFIG, END

ANCHOR = "a"  # decoded before a token, whose own space would be dropped at the start of a text
PLAIN = re.compile(r" [A-Za-z]{2,}")
LEAST = 16


@dataclass(frozen=True)
class Vocabulary:
    """Words of a tokenizer.

    Attributes:
        words: Each with the space before it.
        ids: Of each.
        before: Ids that the tokenizer puts before a text.
        strips: Whether the first word of a text has no space before it.
    """

    words: tuple[str, ...]
    ids: dict[str, int]
    before: tuple[int, ...]
    strips: bool


def write_word_tokenizer(folder: Path, size: int) -> None:
    """Writes a Hugging Face tokenizer of the words w1, w2 and so on; id 0 ends a document.

    Args:
        folder: To make.
        size: Number of ids.

    Raises:
        ValueError: If it is too small to be of use.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    if size <= LEAST:
        raise ValueError(f"vocab_size ({size}) must be more than {LEAST}.")
    names = {END: 0} | {f"w{n}": n for n in range(1, size)}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(END, normalized=False)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def find_words(tokenizer: Tokenizer, most: int) -> Vocabulary:
    """Finds the first `most` words that are one token each, wherever in a text they stand.

    Args:
        tokenizer: Of text.
        most: Words to find; fewer if there are fewer.

    Raises:
        ValueError: If there are hardly any, or the tokenizer puts tokens behind a text.
    """
    anchor = tokenizer.encode(ANCHOR)
    start = tokenizer.decode(anchor)
    found: dict[str, int] = {}
    for number in range(tokenizer.vocab_size):
        if len(found) == most:
            break
        text = tokenizer.decode([*anchor, number])
        word = text[len(start) :] if text.startswith(start) else ""
        if (PLAIN.fullmatch(word)) and tokenizer.encode(ANCHOR + word) == [*anchor, number]:
            found.setdefault(word, number)
    if len(found) < min(LEAST, most):
        raise ValueError(
            "tokenizer must have words that are one token each, and put none behind a text; "
            f"{len(found)} were found. Give another, or --vocab-size N for a tokenizer of such "
            "words alone."
        )
    words = tuple(found)
    ids = [found[word] for word in words[:2]]
    for strips in (False, True):
        text = "".join(words[:2])
        encoded = tokenizer.encode(text.lstrip() if strips else text)
        if encoded[-2:] == ids:
            return Vocabulary(words, found, tuple(encoded[:-2]), strips)
    raise ValueError(
        f"tokenizer must give {words[0]!r} and {words[1]!r} one token each at the start of a text, "
        f"and nothing behind them; it gives {encoded}. Use another."
    )


def own_words(size: int) -> Vocabulary:
    """The words of `write_word_tokenizer`."""
    ids = {f" w{n}": n for n in range(1, size)}
    return Vocabulary(tuple(ids), ids, (), False)
