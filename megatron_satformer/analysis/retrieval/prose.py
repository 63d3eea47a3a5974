"""Tasks in text, of as many tokens as asked for. Answers begin with a space."""

import re
from collections.abc import Callable, Sequence

from megatron_satformer.analysis.retrieval.examples import (
    Difficulty,
    Example,
    Random,
    TooLongError,
    draw,
)
from megatron_satformer.analysis.retrieval.names import FIRST, LAST, NOUNS

WORD = re.compile(r"\S+")
Count = Callable[[str], int]  # tokens of a text
ASKED = "pass key"
TRIES = 100


class Haystack:
    """Real text, word by word.

    Args:
        texts: Documents, joined by blank lines.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._text = "\n\n".join(texts)
        self._spans = [match.span() for match in WORD.finditer(self._text)]

    def __len__(self) -> int:
        return len(self._spans)

    def words(self, first: int, end: int) -> str:
        """Words first to end (exclusive) as they stand in the text, or "" for none."""
        if first >= end:
            return ""
        return self._text[self._spans[first][0] : self._spans[end - 1][1]]


def make_phonebook(
    rng: Random, length: int, depth: float | None, how: Difficulty, count: Count
) -> Example:
    """A list of names and numbers; what is the number of one of them?

    Source: Jelassi et al., Repeat After Me, arXiv 2402.01032, section 4.
    """
    share = how.distractors or 0
    first, last = int(rng.integers(len(FIRST))), int(rng.integers(len(LAST)))
    others = [n for n in range(len(FIRST)) if n != first]
    relatives = [n for n in range(len(LAST)) if n != last]
    near = [(first, n) for n in relatives] + [(n, last) for n in others]
    strangers = len(others) * len(relatives)
    if share > len(near):
        raise ValueError(f"distractors ({share}) must be at most {len(near)} for phonebook.")
    most = min(how.entries or length // 6, strangers)
    if how.entries is not None and how.entries > strangers:
        raise ValueError(f"entries ({how.entries}) must be at most {strangers}.")
    if share >= most:
        raise TooLongError(
            f"distractors ({share}) must be fewer than the {most} entries of {length} tokens."
        )
    people = [near[n] for n in rng.choice(len(near), share, replace=False)]
    for n in rng.choice(strangers, most - 1 - share, replace=False):
        people.append((others[n // len(relatives)], relatives[n % len(relatives)]))
    people.append((first, last))
    numbers = [f"{rng.integers(200, 1000)}-{rng.integers(10_000):04d}" for _ in range(most)]
    ties = rng.random(most)
    where_asked = rng.random() if depth is None else depth

    def build(entries: int) -> Example:
        order = sorted(range(entries - 1), key=lambda n: ties[n])
        at = round(where_asked * (entries - 1))
        order.insert(at, most - 1)
        lines = [f"{_name(people[n])}: {numbers[n]}\n" for n in order]
        question = f"\nThe number of {_name(people[-1])} is"
        context = "Phone book\n\n" + "".join(lines) + question
        return Example((context, f" {numbers[-1]}"), (where_asked,))

    least = share + 2 if how.entries is None else how.entries
    return _fit(build, least, most, length, count, "phonebook")


def _name(person: tuple[int, int]) -> str:
    return f"{FIRST[person[0]]} {LAST[person[1]]}"


def solve_phonebook(context: str) -> str:
    """Looks the name up."""
    name = context.rsplit("The number of ", 1)[1].removesuffix(" is")
    (number,) = re.findall(rf"^{re.escape(name)}: (\S+)$", context, re.MULTILINE)
    return f" {number}"


def make_passkey(
    rng: Random, length: int, depth: float | None, how: Difficulty, count: Count, text: Haystack
) -> Example:
    """A sentence with a number somewhere in real text; which number?

    Source: Mohtashami and Jaggi, Landmark Attention, arXiv 2305.16300, section 4.2; there the text
    is one sentence over and over.
    """
    decoys = how.distractors or 0
    low, high = 10 ** (how.digits - 1), 10**how.digits
    numbers = [str(n) for n in _different(rng, low, high, decoys + 1)]
    places = draw(rng, NOUNS, decoys, "distractors")
    others = [
        f"The {noun} number is {number}. Remember it: {number} is the {noun} number."
        for noun, number in zip(places, numbers[1:], strict=True)
    ]
    key = f"The {ASKED} is {numbers[0]}. Remember it: {numbers[0]} is the {ASKED}."
    where = rng.random(decoys)
    if len(text) < length:
        raise ValueError(
            f"input must hold at least {length} words for each of train, valid and test at a "
            f"length of {length}; one of them has {len(text)}. Give more text, or "
            "smaller --lengths."
        )
    start = _find_clean(rng, text, length, numbers)
    where_asked = rng.random() if depth is None else depth

    def build(words: int) -> Example:
        at = round(where_asked * words)
        needles = [(at, key), *zip((where * words).round().astype(int), others, strict=True)]
        needles.sort(key=lambda needle: needle[0])
        pieces, done = [], 0
        for place_, sentence in needles:
            pieces += [text.words(start + done, start + int(place_)), sentence]
            done = int(place_)
        pieces.append(text.words(start + done, start + words))
        context = " ".join(piece for piece in pieces if piece)
        question = f"\n\nWhat is the {ASKED}? The {ASKED} is"
        return Example((context + question, f" {numbers[0]}"), (where_asked,))

    return _fit(build, 1, length, length, count, "passkey")


def _find_clean(rng: Random, text: Haystack, words: int, numbers: Sequence[str]) -> int:
    """Returns where `words` words begin among which is neither the key's name nor a number."""
    for _ in range(TRIES):
        start = int(rng.integers(len(text) - words + 1))
        found = text.words(start, start + words)
        if ASKED not in found and not set(numbers) & set(re.findall(r"\d+", found)):
            return start
    raise ValueError(
        f"input must hold text without {ASKED!r} and without numbers of {len(numbers[0])} digits. "
        "Give other text, or more --digits."
    )


def _different(rng: Random, low: int, high: int, count: int) -> list[int]:
    if count > high - low:
        raise ValueError(f"distractors ({count - 1}) must be fewer: there are not so many numbers.")
    found: dict[int, None] = {}
    while len(found) < count:
        found[int(rng.integers(low, high))] = None
    return list(found)


def solve_passkey(context: str) -> str:
    """Finds the sentence."""
    (number,) = set(re.findall(rf"The {ASKED} is (\d+)\.", context))
    return f" {number}"


def _fit(
    build: Callable[[int], Example], least: int, most: int, length: int, count: Count, task: str
) -> Example:
    """Returns the longest example of `length` tokens at most, the end of the document included."""

    def fits(size: int) -> bool:
        return count(build(size).text) < length

    if not fits(least):
        raise TooLongError(
            f"length ({length}) must be more for {task}: its shortest example of these options has "
            f"{count(build(least).text) + 1} tokens."
        )
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return build(least)
