"""Whether stored tensors are those of a model, by name and shape. Must not know: of which kind."""

from collections.abc import Mapping, Sequence

LISTED = 40  # in one error, at most


def check_tensor_names(
    stored: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], contradiction: str
) -> None:
    """Compares names and shapes, so that nothing is missed and nothing left out.

    Args:
        stored: Name -> shape.
        expected: Name -> shape, of every tensor that the model has.
        contradiction: How the message begins: what does not fit what.

    Raises:
        ValueError: Lists every name that is missing, of another shape, or not known.
    """
    problems = []
    for name, shape in expected.items():
        if name not in stored:
            problems.append(f"{name} is missing")
        elif tuple(stored[name]) != tuple(shape):
            problems.append(f"{name} is {tuple(stored[name])}, not {tuple(shape)}")
    problems += [f"{name} is not known" for name in sorted(stored.keys() - expected.keys())]
    if problems:
        raise ValueError(f"{contradiction}: {list_problems(problems)}.")


def list_problems(problems: Sequence[str]) -> str:
    """Puts phrases or names on one line, the first of them where there are too many."""
    more = f"; and {len(problems) - LISTED} more" * (len(problems) > LISTED)
    return "; ".join(problems[:LISTED]) + more
