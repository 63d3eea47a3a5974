"""Every retrieval task: who makes it, and the program that answers it from the text alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_satformer.analysis.retrieval import prose, words
from megatron_satformer.analysis.retrieval.examples import Difficulty, Example, Random

Solve = Callable[[str], str]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: Of the task.
        make: (random numbers, length, depth or None, difficulty, what `needs` says...) -> Example.
        solve: Text before an answer -> the answer.
        needs: "words" (single tokens), "count" (a tokenizer of text) or "text" (text besides).
        at_depth: Whether its fact can be put at a depth.
        knows_words: Whether `solve` also takes difficulty and vocabulary.
    """

    name: str
    make: Callable[..., Example]
    solve: Callable[..., str]
    needs: str
    at_depth: bool = True
    knows_words: bool = False

    def solver(self, how: Difficulty, *given: Any) -> Solve:
        """The solver as a function of the context alone."""
        return partial(self.solve, how=how, words=given[0]) if self.knows_words else self.solve

    def maker(self, how: Difficulty, *given: Any) -> Callable[[Random, int, float | None], Example]:
        """The maker as a function of random numbers, length and depth alone."""
        return lambda rng, length, depth: self.make(rng, length, depth, how, *given)


TASKS = {
    task.name: task
    for task in (
        Task("mqar", words.make_mqar, words.solve_lookup, "words", at_depth=False),
        Task(
            "selective_copying",
            words.make_selective_copying,
            words.solve_selective_copying,
            "words",
            at_depth=False,
            knows_words=True,
        ),
        Task("induction", words.make_induction, words.solve_lookup, "words"),
        Task("key_value", words.make_key_value, words.solve_key_value, "words"),
        Task("phonebook", prose.make_phonebook, prose.solve_phonebook, "count"),
        Task("passkey", prose.make_passkey, prose.solve_passkey, "text"),
    )
}
