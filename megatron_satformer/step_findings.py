"""What ranks have found wrong in a step, and how it is told.

Must not know: ranks' groups, training.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DATA, LOSS, GRADIENTS, SUSPECT = range(4)  # the cause first; the last is told alone
MOST = 2  # that are told


class Finding(NamedTuple):
    """What a rank has found; `of` is the file and documents, where the rank knows them."""

    kind: int
    what: str
    of: str
    rank: int

    def __str__(self) -> str:
        return f"{self.what} ({self.of}{', ' * bool(self.of)}rank {self.rank})"


class Check(NamedTuple):
    """A value that was looked at, still on the device.

    Attributes:
        kind: of what is found if it is rejected.
        message: begins the finding.
        rejected: whether it is bad.
        result: the value.
        rows: [b], a loss by sample; None of gradients.
        micro_batch: of the step, from 0.
        origins: files and documents of its samples, where the rank knows them.
    """

    kind: int
    message: str
    rejected: Tensor | bool
    result: Tensor
    rows: Tensor | None
    micro_batch: int
    origins: Sequence[str]

    def describe(self, rank: int, places: Sequence[int]) -> list[Finding]:
        """What there is to tell of a value that was rejected.

        Args:
            rank: that has found it.
            places: of the micro-batch's samples in the global batch.
        """
        if self.rows is None:
            return [Finding(self.kind, self.message, "", rank)]
        bad = list(range(len(places)))
        if self.rows.numel() == len(places):
            bad = torch.nonzero(~torch.isfinite(self.rows)).flatten().tolist()
            bad = bad or [int(self.rows.argmax())]
        value = f"{self.message} {self.result.item():.4g}"
        known = self.origins if len(self.origins) == len(places) else [""] * len(places)
        return [
            Finding(self.kind, f"{value} in sample {places[row]} of the batch", known[row], rank)
            for row in bad
        ]


def find_causes(found: Iterable[Finding]) -> list[Finding]:
    """Of all ranks' findings the causes: a loss that is no number is in all gradients.

    A sample is read by several ranks, of which not all know its file.
    """
    ordered = sorted(found, key=lambda one: (one.kind, one.what, not one.of, one.rank))
    told: dict[tuple[int, str], Finding] = {}
    for finding in ordered:
        told.setdefault((finding.kind, finding.what), finding)
    return [one for one in told.values() if one.kind in (ordered[0].kind, SUSPECT)]


def name_findings(found: Sequence[Finding]) -> str:
    """The first of them, and how many there are besides."""
    told = "; ".join(map(str, found[:MOST]))
    return told + f"; and {len(found) - MOST} more" * (len(found) > MOST)
