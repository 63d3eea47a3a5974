"""What an example of a retrieval task is, and what makes it difficult."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

Random = np.random.Generator


class TooLongError(ValueError):
    """An example of these options that does not fit its length."""


@dataclass(frozen=True)
class Example:
    """A text with answers in it.

    Attributes:
        parts: Text, answer, text, answer and so on; joined, they are the whole.
        depths: Of each answer, how far into the text before the question its fact stands: 0 at the
            start, 1 right before the question; where a depth was asked for, that one. None where
            the fact stands in several places.
    """

    parts: tuple[str, ...]
    depths: tuple[float | None, ...]

    @property
    def text(self) -> str:
        """The whole."""
        return "".join(self.parts)

    @property
    def answers(self) -> tuple[str, ...]:
        """What is asked for, in order."""
        return self.parts[1::2]

    def context(self, number: int) -> str:
        """Everything before answer `number`."""
        return "".join(self.parts[: 2 * number + 1])

    def spans(self) -> list[tuple[int, int]]:
        """Where each answer begins and ends, in characters."""
        ends = np.cumsum([len(part) for part in self.parts])
        return [(int(ends[n - 1]), int(ends[n])) for n in range(1, len(ends), 2)]


@dataclass(frozen=True)
class Difficulty:
    """What makes a task harder or easier; each task reads its own.

    Attributes:
        pairs: mqar: key-value pairs, each asked for once; a 16th of the length if left out.
        power_a: mqar: exponent of the power law of the gaps, Zoology's a: the smaller, the sooner
            most questions come behind the pairs.
        copies: selective_copying: words to copy.
        copied_words: selective_copying: size of the vocabulary that they are from.
        noise_words: selective_copying: different words between them.
        distractors: key_value: entries that share half of the key that is asked for (8 if left
            out); phonebook: people who share a name with the one asked for (0); passkey: other
            numbers in the text (0).
        entries: key_value and phonebook: entries; as many as fit the length if left out.
        digits: passkey: digits of the key.

    Raises:
        ValueError: If one is out of its range.
    """

    pairs: int | None = None
    power_a: float = 0.01
    copies: int = 16
    copied_words: int = 16
    noise_words: int = 1
    distractors: int | None = None
    entries: int | None = None
    digits: int = 5

    def __post_init__(self) -> None:
        least = {"power_a": 0.0, "distractors": 0, "entries": 2, "copied_words": 2}
        for field in fields(self):
            value, lowest = getattr(self, field.name), least.get(field.name, 1)
            if value is not None and not value >= lowest:
                raise ValueError(f"{field.name} ({value}) must be at least {lowest}.")
        if self.digits > 12:
            raise ValueError(f"digits ({self.digits}) must be at most 12.")


def draw(rng: Random, among: Sequence[str], count: int, what: str) -> list[str]:
    """Returns `count` different ones in random order.

    Raises:
        ValueError: If there are fewer.
    """
    if count > len(among):
        raise ValueError(
            f"{what} ({count}) must be at most {len(among)}: there are no more words. Give a "
            "larger vocabulary, or shorter or easier examples."
        )
    return [among[n] for n in rng.choice(len(among), count, replace=False)]


def place(depth: float | None, rng: Random, count: int) -> int:
    """Returns which of `count` places is at this depth; at random without one."""
    if depth is None:
        return int(rng.integers(count))
    return round(depth * (count - 1))
