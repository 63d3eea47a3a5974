"""What gates do while a model trains: mean alpha, exact zeros and dead KV heads, per mixing layer.

Sums are kept on the device and added up over all ranks once per interval; other steps cost
nothing. Must not know: architectures, training, where the figures go.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from megatron.core.parallel_state import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from torch import Tensor


class Gates(NamedTuple):
    """Of one layer, over all tokens of a step.

    Attributes:
        mean: of alpha.
        zeros: share of alpha that is exactly 0.
        dead: number of KV heads with nothing but zeros: where the gate is relu, no gradient.
    """

    mean: float
    zeros: float
    dead: int


class GateStats:
    """Follows every module that has an `alpha_observer`.

    Args:
        num_layers: of the model.
        heads: KV heads of the model.
        interval: steps from one that is observed to the next.
    """

    def __init__(self, num_layers: int, heads: int, interval: int) -> None:
        self.num_layers, self.heads, self.interval = num_layers, heads, interval
        self._observing = True  # which step comes first only the checkpoint knows
        self._sums: Tensor | None = None  # [num_layers, ng, 3]: alpha, zeros, how many

    def watch(self, chunks: Iterable[Any]) -> Iterable[Any]:
        """Observe the gates of this rank's part of the model (a `pre_wrap_hooks` of Megatron's)."""
        for chunk in chunks:
            for module in chunk.modules():
                if hasattr(module, "alpha_observer"):
                    module.alpha_observer = self.observe
        return chunks

    @torch.no_grad()
    def observe(self, layer_number: int, gate: Callable[[], Tensor]) -> None:
        """Add the gates of one micro-batch, or, recomputed, the same once more.

        Args:
            layer_number: 1-based.
            gate: computes alpha, [..., ng/tp, channels or 1]; called in observed steps alone.
        """
        if not self._observing:
            return
        alpha = gate().movedim(-2, 0).flatten(1)
        first = (
            self.heads * get_tensor_model_parallel_rank() // get_tensor_model_parallel_world_size()
        )
        rows = self._of(alpha.device)[layer_number - 1, first : first + len(alpha)]
        rows[:, 0] += alpha.sum(1, dtype=torch.float32)
        rows[:, 1] += (alpha == 0).sum(1)
        rows[:, 2] += alpha.size(1)

    def take(self, step: int) -> dict[int, Gates]:
        """Figures by layer behind a step, on every rank; nothing where the step is not observed.

        Args:
            step: that has just been made, by all ranks.
        """
        found: dict[int, Gates] = {}
        if step % self.interval == 0:
            sums = self._of(torch.cuda.current_device())
            torch.distributed.all_reduce(sums)
            alpha, zeros, count = sums.sum(1).T.tolist()
            dead = ((sums[..., 1] == sums[..., 2]) & (sums[..., 2] > 0)).sum(1).tolist()
            found = {
                n + 1: Gates(alpha[n] / count[n], zeros[n] / count[n], dead[n])
                for n in range(self.num_layers)
                if count[n]
            }
        self._sums = None
        self._observing = (step + 1) % self.interval == 0
        return found

    def _of(self, device: torch.device | int) -> Tensor:
        if self._sums is None:
            self._sums = torch.zeros(
                self.num_layers, self.heads, 3, dtype=torch.float64, device=device
            )
        return self._sums
