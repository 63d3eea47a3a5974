"""LIMe in torch alone (arXiv 2502.09245).

    [K; V]_n     = W_kv,n x_n
    [K'; V']_n,g = sum_l sum_j R_n[g, l, j] [K; V]_l,j  over layers l <= n and KV heads j

for layers n >= 2 (1-based). QK-norm and RoPE come after.

Shapes: b batch, s sequence, ng KV heads, hn head dim.
"""

import torch
from torch import Tensor, nn

from megatron_satformer.model.reference.decoder import (
    Attention,
    Carried,
    Decoder,
    Shown,
    TwinConfig,
)


class RoutedAttention(Attention):
    """Attention that reads sums of the keys and values of all heads of all layers so far."""

    def __init__(self, config: TwinConfig, layer: int) -> None:
        super().__init__(config, layer)
        if layer:
            ng, n = config.num_key_value_heads, layer + 1
            bound = (3 / (n * ng)) ** 0.5
            router = torch.empty(ng, n, ng).uniform_(-bound, bound)
            router[:, layer] = torch.eye(ng)
            self.lime_router = nn.Parameter(router)

    def mix(
        self, x: Tensor, k: Tensor, v: Tensor, carried: Carried
    ) -> tuple[Tensor, Tensor, Carried, Shown]:
        """The equation; what is carried are K_1, V_1, K_2 .. [b, s, ng, hn] each."""
        carried = (*carried, k, v)
        if self.layer:
            k, v = (
                torch.einsum("glj,lbsjd->bsgd", self.lime_router, torch.stack(history))
                for history in (carried[0::2], carried[1::2])
            )
        return k, v, carried, None


class LIMe(Decoder):
    """The plain twin of --architecture lime."""

    attention_class = RoutedAttention
