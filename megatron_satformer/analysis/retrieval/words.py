"""Tasks whose words are single tokens. Every answer and every word begins with a space.

`length` counts words: the example's, the last of which is not here but the end-of-document token.
Each maker has its solver beside it, which sees nothing but the text before the answer.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from megatron_satformer.analysis.retrieval.examples import (
    Difficulty,
    Example,
    Random,
    TooLongError,
    draw,
    place,
)

Words = Sequence[str]


def make_mqar(
    rng: Random, length: int, depth: float | None, how: Difficulty, words: Words
) -> Example:
    """Multi-query associative recall: pairs of a key and a value, then every key again, in gaps.

    The places of the questions behind the pairs follow Zoology's power law, p(g) ~ a g^(a-1).
    Between them stand random words, none of which is a key that is asked for. Keys are from the
    first half of the vocabulary, values from the second.

    Source: Arora et al., Zoology, arXiv 2312.04927, section 3 and appendix. There a label alone
    holds the value that is asked for; here it follows the question, as in text.
    """
    pairs = how.pairs or max(1, min(length // 16, len(words) // 4))
    slots = (length - 1 - 2 * pairs) // 2
    if slots < pairs:
        raise TooLongError(
            f"pairs ({pairs}) must be at most {(length - 1) // 4} at a length of {length}: each is "
            "there twice. Ask for fewer."
        )
    half = len(words) // 2
    keys = draw(rng, words[:half], pairs, "pairs")
    values = draw(rng, words[half:], pairs, "pairs")
    law = np.arange(1, slots + 1, dtype=float) ** (how.power_a - 1)
    gaps = rng.choice(slots, pairs, replace=False, p=law / law.sum())
    taken = set(keys)
    others = [word for word in words if word not in taken]
    if not others:
        raise ValueError(f"pairs ({pairs}) must leave words for what stands between. Ask fewer.")
    noise = rng.integers(len(others), size=2 * slots)
    rest = [others[n] for n in noise]
    for gap, key, value in zip(gaps, keys, values, strict=True):
        rest[2 * gap : 2 * gap + 2] = key, value
    start = [word for pair in zip(keys, values, strict=True) for word in pair]
    parts, depths, done = [], [], 0
    whole = start + rest
    for pair in np.argsort(gaps):
        at = 2 * pairs + 2 * int(gaps[pair]) + 1  # of the answer
        parts += ["".join(whole[done:at]), whole[at]]
        depths.append(2 * int(pair) / (at - 1))
        done = at + 1
    return Example(tuple(parts), tuple(depths))


def make_induction(
    rng: Random, length: int, depth: float | None, how: Difficulty, words: Words
) -> Example:
    """Random words, one of which comes again at the end: what followed it?

    Source: Olsson et al., arXiv 2209.11895; as a task, Fu et al. (H3), arXiv 2212.14052.
    """
    count = length - 3
    if count < 2:
        raise TooLongError(f"length ({length}) must be at least 5 for induction.")
    trigger = int(rng.integers(len(words)))
    numbers = rng.integers(len(words) - 1, size=count)
    numbers += numbers >= trigger
    at = place(depth, rng, count - 1)
    numbers[at] = trigger
    text = [words[n] for n in numbers]
    found = at / (count - 2 or 1) if depth is None else depth
    return Example(("".join(text) + words[trigger], text[at + 1]), (found,))


def solve_lookup(context: str) -> str:
    """Answers mqar and induction: what followed the last word before."""
    *before, asked = context.split()
    found = {after for word, after in pairwise(before) if word == asked}
    if len(found) != 1:
        raise ValueError(f"{asked!r} was followed by {sorted(found)}")
    return f" {found.pop()}"


def make_selective_copying(
    rng: Random, length: int, depth: float | None, how: Difficulty, words: Words
) -> Example:
    """Words among noise, to be repeated in order behind a marker, without the noise.

    The first word of the vocabulary is the marker, then come those of the noise, then those to
    copy. Source: Gu and Dao, Mamba, arXiv 2312.00752, section 4.1.1.
    """
    noise = 1 + how.noise_words
    if noise + how.copied_words > len(words):
        raise ValueError(
            f"copied_words ({how.copied_words}) and noise_words ({how.noise_words}) must be fewer "
            f"than the {len(words)} words of the vocabulary together."
        )
    count = length - 2 - how.copies
    if count < how.copies:
        raise TooLongError(
            f"copies ({how.copies}) must be at most {(length - 2) // 2} at a length of {length}."
        )
    text = [words[n] for n in 1 + rng.integers(how.noise_words, size=count)]
    copied = [words[n] for n in noise + rng.integers(how.copied_words, size=how.copies)]
    for at, word in zip(np.sort(rng.choice(count, how.copies, False)), copied, strict=True):
        text[at] = word
    return Example(("".join(text) + words[0], "".join(copied)), (None,))


def solve_selective_copying(context: str, how: Difficulty, words: Words) -> str:
    """Leaves the noise out."""
    noise = {word.strip() for word in words[: 1 + how.noise_words]}
    return "".join(f" {word}" for word in context.split() if word not in noise)


def make_key_value(
    rng: Random, length: int, depth: float | None, how: Difficulty, words: Words
) -> Example:
    """Entries of a key of two words and a value; distractors share one word of the key.

    Source: the task of Liu et al., Lost in the Middle, arXiv 2307.03172, section 3, where keys are
    random UUIDs; halves in common make a look at one word of the key not enough.
    """
    most = (length - 4) // 3
    entries = how.entries or most
    distractors = how.distractors if how.distractors is not None else min(8, entries - 1)
    if not distractors < entries <= most:
        raise TooLongError(
            f"entries ({entries}) must be more than distractors ({distractors}) and at most {most} "
            f"at a length of {length}."
        )
    half = len(words) // 2
    keys, values = words[:half], words[half:]
    first, second = draw(rng, keys, 2, "a key's words")
    near = [(first, word) for word in keys if word != second]
    near += [(word, second) for word in keys if word != first]
    if distractors > len(near):
        raise ValueError(f"distractors ({distractors}) must be at most {len(near)}, by the words.")
    chosen = [near[n] for n in rng.choice(len(near), distractors, replace=False)]
    found = {(first, second), *chosen}
    far = [word for word in keys if word not in (first, second)]
    if len(far) ** 2 < entries - len(found):
        raise ValueError(f"entries ({entries}) must be fewer: there are {len(words)} words.")
    while len(found) < entries:
        found.add((far[rng.integers(len(far))], far[rng.integers(len(far))]))
    others = sorted(found - {(first, second)})
    order = [others[n] for n in rng.permutation(len(others))]
    at = place(depth, rng, entries)
    order.insert(at, (first, second))
    drawn = [values[n] for n in rng.integers(len(values), size=entries)]
    text = "".join(a + b + value for (a, b), value in zip(order, drawn, strict=True))
    found_at = at / (entries - 1) if depth is None else depth
    return Example((text + first + second, drawn[at]), (found_at,))


def solve_key_value(context: str) -> str:
    """Reads three words at a time."""
    words = context.split()
    for n in range(0, len(words) - 2, 3):
        if words[n : n + 2] == words[-2:]:
            return f" {words[n + 2]}"
    raise ValueError("no entry has this key")
