"""Tokens by what they are, how common they are, and where they stand.

What a token is, is seen in its text, whatever tokenizer made it: SentencePiece, byte-level BPE.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
POSITIONS = (0, 1, 16, 64, 256, 1024, 4096)
FIFTHS = 5
SENTENCE_ENDS = ".!?:\n"
COUNTED = 20_000_000  # tokens that are counted at most
FUNCTION_WORDS = frozenset(
    "a about above after again against all am among an and any are as at be because been before "
    "being below between both but by can could did do does doing down during each either ere few "
    "for from further had has hast hath have having he her here hers herself him himself his how i "
    "if in into is it its itself may me might mine more most must my myself neither no nor not of "
    "off on once only or other our ours ourselves out over own same shall shalt she should since "
    "so some such than that the thee their theirs them themselves then thence there these they "
    "thine this those thou though through thus thy till to too under until unto up upon us very "
    "was we were what when whence where whether which while who whom whose why will wilt with "
    "within without would yet you your yours yourself yourselves".split()
)
GROUPS: dict[str, tuple[str, ...]] = {
    "word": ("word start", "word inside"),
    "kind": ("punctuation", "digits", "function word", "name", "other word", "no word"),
    "frequency": ("rarest fifth", "rare", "middling", "frequent", "most frequent fifth"),
    "occurrence": ("first in sequence", "repeated"),
    "position": tuple(
        f"{low}" if high == low + 1 else f"{low} to {high - 1}" for low, high in pairwise(POSITIONS)
    )
    + (f"{POSITIONS[-1]} and on",),
    "loss": ("lowest fifth", "low", "middle", "high", "highest fifth"),
}


class TokenTexts:
    """The text of a token as it stands within a text, with the space before a word.

    Args:
        tokenizer: Of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        before = tokenizer.encode("a", add_special_tokens=False)
        self._before = before[-1:]  # decoding drops the space at the start of a text
        self._known: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """The text of each token; of special ones, none."""
        for token in set(ids) - self._known.keys():
            self._known[token] = "" if token in self._special else self._text(token)
        return [self._known[token] for token in ids]

    def shown(self, ids: Sequence[int]) -> list[str]:
        """As to be read: special tokens by their names."""
        return [
            text if token not in self._special else self._tokenizer.convert_ids_to_tokens(token)
            for token, text in zip(ids, self(ids), strict=True)
        ]

    def _text(self, token: int) -> str:
        head = self._decode(self._before)
        whole = self._decode([*self._before, token])
        return whole[len(head) :] if whole.startswith(head) else self._decode([token])

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text


def find_frequencies(tokens: npt.NDArray, vocab_size: int) -> npt.NDArray:
    """The fifth of each token id, 0 the rarest: each has about a fifth of the corpus' tokens.

    Args:
        tokens: Of the corpus; the first `COUNTED` are counted.
        vocab_size: Number of ids.
    """
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, min(tokens.size, COUNTED), 1_000_000):
        counts += np.bincount(tokens[start : start + 1_000_000], minlength=vocab_size)
    order = np.argsort(counts, kind="stable")
    below = np.concatenate(([0], np.cumsum(counts[order])[:-1]))
    fifths = np.zeros(vocab_size, np.int8)
    middle = below + counts[order] / 2
    fifths[order] = np.minimum(FIFTHS - 1, middle * FIFTHS // max(1, int(counts.sum())))
    return fifths


def categorize(
    ids: npt.NDArray,
    texts: TokenTexts,
    frequencies: npt.NDArray,
    losses: npt.NDArray,
    loss_edges: npt.NDArray,
) -> dict[str, npt.NDArray]:
    """The category of every token in every group; -1 where it has none.

    Args:
        ids: [b, s].
        texts: Of tokens.
        frequencies: From `find_frequencies`.
        losses: Of every token, NaN where it has none. [b, s]
        loss_edges: What divides the fifths. [4]

    Returns:
        Group -> number of the category in `GROUPS`. [b, s]
    """
    word, kind = np.full(ids.shape, -1, np.int8), np.full(ids.shape, -1, np.int8)
    occurrence = np.ones(ids.shape, np.int8)
    for row, tokens in enumerate(ids.tolist()):
        word[row], kind[row] = _read(texts(tokens))
        occurrence[row, np.unique(ids[row], return_index=True)[1]] = 0
    position = np.searchsorted(POSITIONS, np.arange(ids.shape[1]), side="right") - 1
    fifth = np.searchsorted(loss_edges, np.nan_to_num(losses))
    return {
        "word": word,
        "kind": kind,
        "frequency": frequencies[ids],
        "occurrence": occurrence,
        "position": np.broadcast_to(position, ids.shape),
        "loss": np.where(np.isnan(losses), -1, fifth),
    }


def _read(texts: list[str]) -> tuple[list[int], list[int]]:
    """Word and kind of the tokens of one text."""
    starts = _find_starts(texts)
    kinds: list[int] = []
    sentence_begins = True
    for n, text in enumerate(texts):
        stripped = text.strip()
        ends_word = n + 1 == len(texts) or starts[n + 1] != 1
        begins = starts[n] == 0
        kind = GROUPS["kind"].index("no word")
        if not stripped or INCOMPLETE in stripped:
            pass
        elif not any(map(str.isalnum, stripped)):
            kind = GROUPS["kind"].index("punctuation")
        elif not any(map(str.isalpha, stripped)):
            kind = GROUPS["kind"].index("digits")
        elif begins and ends_word and stripped.lower() in FUNCTION_WORDS:
            kind = GROUPS["kind"].index("function word")
        elif begins and stripped[0].isupper() and not sentence_begins:
            kind = GROUPS["kind"].index("name")
        elif not begins and kinds and kinds[-1] == GROUPS["kind"].index("name"):
            kind = kinds[-1]
        else:
            kind = GROUPS["kind"].index("other word")
        kinds.append(kind)
        if any(map(str.isalnum, stripped)):
            sentence_begins = text[-1] in SENTENCE_ENDS
        elif not text or text[-1] in SENTENCE_ENDS or "\n" in text:
            sentence_begins = True
    return starts, kinds


def _find_starts(texts: list[str]) -> list[int]:
    """0 where a word starts, 1 within one, -1 for what is no part of a word."""
    starts = []
    last = " "
    for text in texts:
        stripped = text.strip()
        if not any(map(str.isalnum, stripped)):
            starts.append(-1)
        else:
            inside = not text[0].isspace() and (last.isalnum() or last in "'\u2019-")
            starts.append(int(inside))
        last = text[-1:] or " "
    return starts
