"""Where a model shows with what it weighs what layers read of others; it imports torch alone."""

from collections.abc import Sequence
from typing import Any

from torch import nn


class LearnedAccess(nn.Identity):
    """Hands on the weights with which its parent is about to sum up what earlier layers made.

    It has no parameters and computes nothing: a forward hook on it sees the weights as they are
    used, and what the hook returns is used in their place. They are a tensor [b, s, targets,
    sources], [b, s, sources] of one target, or, where they are the same for every token, the same
    without b and s or a tuple of scalars.

    Attributes:
        sources: Names of what is weighed, or one name to be numbered from 0. Weights whose names
            are the same, as those of channels, are shown as one.
        targets: Names of the sums, likewise.
        gate: Whether a single source is added to what would be there without it: weights of 0
            shut it out.
        zeros: Share of weights that are exactly 0 at initialisation.
    """

    def __init__(
        self,
        sources: Sequence[str] | str,
        targets: Sequence[str] | str = ("",),
        gate: bool = False,
        zeros: float = 0.0,
    ) -> None:
        super().__init__()
        self.sources: Any = sources
        self.targets: Any = targets
        self.gate = gate
        self.zeros = zeros


def number_names(count: int) -> list[str]:
    """1 to count as names."""
    return [str(n + 1) for n in range(count)]
