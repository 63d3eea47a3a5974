"""Every task has one answer, which a program finds in the text and nothing finds without it."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from megatron_satformer.analysis.retrieval.examples import Difficulty, TooLongError
from megatron_satformer.analysis.retrieval.prose import Haystack
from megatron_satformer.analysis.retrieval.tasks import TASKS
from megatron_satformer.analysis.retrieval.vocabulary import own_words
from tests.texts import source_texts

WORDS = own_words(65).words
LENGTH = 96
# Task, its options, and how likely a guess among all answers is right.
KINDS = [
    ("mqar", {"pairs": 4}, 1 / 32),
    ("mqar", {"pairs": 12, "power_a": 1.0}, 1 / 32),
    ("selective_copying", {"copies": 1}, 1 / 16),
    ("selective_copying", {"copies": 2, "copied_words": 4, "noise_words": 40}, 1 / 16),
    ("induction", {}, 1 / 64),
    ("key_value", {}, 1 / 32),
    ("key_value", {"entries": 10, "distractors": 9}, 1 / 32),
    ("phonebook", {}, 1e-3),
    ("phonebook", {"entries": 5, "distractors": 3}, 1e-3),
    ("passkey", {"digits": 2}, 1 / 90),
    ("passkey", {"digits": 5, "distractors": 2}, 1e-3),
]
IDS = [f"{name}-{number}" for number, (name, *_) in enumerate(KINDS)]


def count(text: str) -> int:
    """A tokenizer whose tokens are words and line ends."""
    return len(text.split()) + text.count("\n")


def build(name, options, seed, examples, depth=None, length=LENGTH):
    task, how = TASKS[name], Difficulty(**options)
    given = {
        "words": [WORDS],
        "count": [count],
        "text": [count, Haystack(source_texts()[:2])],
    }[task.needs]
    make = task.maker(how, *given)
    rng = np.random.default_rng(seed)
    return task.solver(how, *given), [make(rng, length, depth) for _ in range(examples)]


@pytest.mark.parametrize(("name", "options", "chance"), KINDS, ids=IDS)
def test_solved_from_the_context_alone(name, options, chance):
    solve, examples = build(name, options, 0, 60)
    for example in examples:
        assert len(example.answers) == len(example.depths) > 0
        assert all(answer.startswith(" ") for answer in example.answers)
        assert not any(text.endswith(" ") for text in example.parts[::2])
        assert count(example.text) < LENGTH
        assert [solve(example.context(n)) for n in range(len(example.answers))] == [
            *example.answers
        ]
        begin, end = example.spans()[-1]
        assert example.text[begin:end] == example.answers[-1]


def guesses(example):
    """What a program could know of an answer without looking for it: the places of words."""
    for number, answer in enumerate(example.answers):
        words = example.context(number).split()
        fixed = {f"word {n}": words[n] for n in range(min(30, len(words)))}
        fixed |= {f"word -{n}": words[-n] for n in range(1, min(30, len(words)))}
        counted = Counter(words).most_common()
        fixed |= {"often": counted[0][0], "seldom": counted[-1][0]}
        yield fixed, words[-1], answer.strip()


@pytest.mark.parametrize(("name", "options", "chance"), KINDS, ids=IDS)
def test_no_answer_is_known_without_the_context(name, options, chance):
    """The commonest answer, that of the same question, and the best place, learnt on others."""
    (_, learnt), (_, asked) = (build(name, options, seed, 400) for seed in (1, 2))
    answers, by_question = Counter(), defaultdict(Counter)
    places = Counter()
    for example in learnt:
        for fixed, question, answer in guesses(example):
            answers[answer] += 1
            by_question[question][answer] += 1
            places.update(place for place, word in fixed.items() if word == answer)
    best = places.most_common(1)[0][0] if places else "word 0"
    right, total = Counter(), 0
    for example in asked:
        for fixed, question, answer in guesses(example):
            total += 1
            right["commonest"] += answers.most_common(1)[0][0] == answer
            known = by_question.get(question, answers)
            right["question"] += known.most_common(1)[0][0] == answer
            right["place"] += fixed.get(best) == answer
    # At every place stands one of so many facts: a pair, a word of the text, a line.
    facts = {"mqar": 4, "induction": LENGTH - 4, "key_value": 30, "phonebook": 15, "passkey": 50}
    facts[name] = options.get("pairs", options.get("entries", facts.get(name, 1e9)))
    for kind, hits in right.items():
        fair = chance + (kind == "place") / facts[name]
        assert hits / total < fair + 4 * np.sqrt(fair / total), (kind, best)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.at_depth])
def test_facts_stand_at_their_depth(name):
    for depth in (0.0, 0.25, 0.5, 1.0):
        _, examples = build(name, {}, 3, 20, depth)
        places = []
        for example in examples:
            context, answer = example.context(0), example.answers[0]
            question = {"passkey": "\n\nWhat", "phonebook": "\n\nThe number"}.get(name)
            if question:
                text = context.rpartition(question)[0].removeprefix("Phone book\n\n")
            else:
                text = context.rsplit(" ", 2 if name == "key_value" else 1)[0]
            asked = {
                "passkey": "The pass key is",
                "phonebook": context.rpartition("of ")[2].removesuffix(" is") + ":",
            }.get(name, context[len(text) :])
            begin = f"{text} ".index(f"{asked} ")
            needle = len(asked + answer) if name != "passkey" else len(asked) + 44
            places.append(begin / (len(text) - needle))
            assert example.depths == (depth,)
        assert np.mean(places) == pytest.approx(depth, abs=0.06), places


def test_gaps_follow_the_power_law():
    """Zoology's: a of 0.01 asks soon, a of 1 anywhere."""
    means = {}
    for a in (0.01, 1.0):
        _, examples = build("mqar", {"pairs": 4, "power_a": a}, 4, 150)
        firsts = [len(example.parts[0].split()) - 9 for example in examples]
        slots = (LENGTH - 1 - 8) // 2
        law = np.arange(1, slots + 1) ** (a - 1.0)
        law = law / law.sum()
        # of the first of four questions, drawn without replacement
        rng = np.random.default_rng(0)
        drawn = [rng.choice(slots, 4, replace=False, p=law).min() * 2 for _ in range(1000)]
        assert np.mean(firsts) == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 12)
        means[a] = np.mean(firsts)
    assert means[1.0] > 3 * means[0.01]


@pytest.mark.parametrize(
    ("name", "options", "length", "words"),
    [
        ("mqar", {"pairs": 9}, 32, r"pairs \(9\) must be at most 7 at a length of 32"),
        ("mqar", {"pairs": 40}, 400, r"pairs \(40\) must be at most 32"),
        ("selective_copying", {"copies": 20}, 32, r"copies \(20\) must be at most 15"),
        ("selective_copying", {"copied_words": 70}, 96, r"copied_words \(70\) and noise_words"),
        ("key_value", {"entries": 40}, 96, r"entries \(40\) must be more than distractors"),
        ("key_value", {"distractors": 70}, 300, r"distractors \(70\) must be at most 62"),
        ("phonebook", {"entries": 60}, 96, r"length \(96\) must be more for phonebook"),
        ("phonebook", {"distractors": 300}, 4000, r"distractors \(300\) must be at most"),
        ("passkey", {"distractors": 21}, 900, r"distractors \(21\) must be at most 20"),
        ("passkey", {}, 16, r"length \(16\) must be more for passkey"),
        ("passkey", {}, 10**6, r"input must hold at least 1000000 words"),
    ],
)
def test_what_cannot_be_made(name, options, length, words):
    with pytest.raises(ValueError, match=words):
        build(name, options, 0, 1, length=length)
    assert issubclass(TooLongError, ValueError)


@pytest.mark.parametrize("wrong", [{"pairs": 0}, {"power_a": -1.0}, {"digits": 13}, {"entries": 1}])
def test_difficulty_is_checked(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"{name} \({wrong[name]}\) must be at (least|most)"):
        Difficulty(**wrong)
