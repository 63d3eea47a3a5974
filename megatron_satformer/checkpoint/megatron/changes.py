"""The table of what a run that goes on asks for otherwise than the run that was."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

HEAD = ("option", "then", "now", "what it means")
LONGEST = 40  # characters of a value


@dataclass(frozen=True)
class Change:
    """One row; a remark on what is as it was, where `then` is `now`.

    Attributes:
        option: As on the command line, with underscores.
        then: Its value in the run that saved the checkpoint.
        now: Its value in this one.
        meaning: A phrase; "refused" where there is a refusal.
        refusal: Why the run must not go on so, and the way out.
    """

    option: str
    then: Any
    now: Any
    meaning: str = "refused"
    refusal: Exception | None = None


def describe_changes(head: str, changes: Sequence[Change]) -> str:
    """Returns the table, each line with Megatron's mark of a remark.

    Args:
        head: What goes on, and from where.
        changes: Its rows.
    """
    rows = [HEAD, *((c.option, _short(c.then), _short(c.now), c.meaning) for c in changes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD) - 1)]
    lines = [f"> {head}:"]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([">  ", *cells, row[-1]]))
    return "\n".join(lines)


def first_refusal(changes: Iterable[Change]) -> Exception | None:
    """The first row's that has one; it says how many more there are."""
    refusals = [change.refusal for change in changes if change.refusal is not None]
    if len(refusals) > 1:
        more = f"{refusals[0]} (The table above has {len(refusals) - 1} more.)"
        return type(refusals[0])(more)
    return refusals[0] if refusals else None


def _short(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= LONGEST else f"...{text[3 - LONGEST :]}"
