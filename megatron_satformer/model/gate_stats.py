"""What gates do while a model trains: mean alpha, and share of exact zeros, per mixing layer.

Sums are kept on the device and added up over all ranks once per interval; other steps cost
nothing. Must not know: architectures, training, where the figures go.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Gates(NamedTuple):
    """Of one layer, over all KV heads and all tokens of a step."""

    mean: float
    zeros: float


class GateStats:
    """Follows every module that has an `alpha_observer`.

    Args:
        num_layers: of the model.
        interval: steps from one that is observed to the next.
    """

    def __init__(self, num_layers: int, interval: int) -> None:
        self.num_layers, self.interval = num_layers, interval
        self._observing = True  # which step comes first only the checkpoint knows
        self._sums: Tensor | None = None  # [num_layers, 3]: alpha, zeros, how many

    def watch(self, chunks: Iterable[Any]) -> Iterable[Any]:
        """Observe the gates of this rank's part of the model (a `pre_wrap_hooks` of Megatron's)."""
        for chunk in chunks:
            for module in chunk.modules():
                if hasattr(module, "alpha_observer"):
                    module.alpha_observer = self.observe
        return chunks

    @torch.no_grad()
    def observe(self, layer_number: int, alpha: Tensor) -> None:
        """Add the gates of one micro-batch, or, recomputed, the same once more.

        Args:
            layer_number: 1-based.
            alpha: [s, b, ng/tp].
        """
        if not self._observing:
            return
        row = self._of(alpha.device)[layer_number - 1]
        row[0] += alpha.sum(dtype=torch.float32)
        row[1] += (alpha == 0).sum()
        row[2] += alpha.numel()

    def take(self, step: int) -> dict[int, Gates]:
        """Figures by layer behind a step, on every rank; nothing where the step is not observed.

        Args:
            step: that has just been made, by all ranks.
        """
        found: dict[int, Gates] = {}
        if step % self.interval == 0:
            sums = self._of(torch.cuda.current_device())
            torch.distributed.all_reduce(sums)
            found = {
                layer: Gates(alpha / count, zeros / count)
                for layer, (alpha, zeros, count) in enumerate(sums.tolist(), 1)
                if count
            }
        self._sums = None
        self._observing = (step + 1) % self.interval == 0
        return found

    def _of(self, device: torch.device | int) -> Tensor:
        if self._sums is None:
            self._sums = torch.zeros(self.num_layers, 3, dtype=torch.float64, device=device)
        return self._sums
