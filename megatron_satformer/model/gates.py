"""alpha = gate(logits): one scalar per token and KV head, or, by modules, per head or per channel.

Shapes: s sequence, b micro-batch, ng KV heads of the model, hn head dim, kv = ng hn, r rank of a
low-rank map; "/tp" marks what a rank holds.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    get_cuda_rng_tracker,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor
from torch.distributed import ProcessGroup

LEAK = 0.01  # of leaky_relu, below 0


def apply_gate(logits: Tensor, gate: str, tp_group: ProcessGroup) -> Tensor:
    """Turn gate logits into alpha.

    The softmax forms run over all KV heads of the model, scaled by their number. Under tensor
    parallelism that costs one all-gather of [s, b, ng] forward and its reduce-scatter backward;
    the others need no communication.

    Args:
        logits: [s, b, ng/tp].
        gate: a function of the logits, see `architectures/gate_options.py`.
        tp_group: tensor-parallel group over which the KV heads are sharded.

    Returns:
        alpha, [s, b, ng/tp], in the dtype of `logits`.

    Source: arXiv 2605.03953, section on gate functions.
    """
    if gate == "relu":
        return torch.relu(logits)  # >= 0; half of them exactly 0 at init
    if gate == "leaky_relu":
        return F.leaky_relu(logits, LEAK)  # as relu, with a gradient everywhere
    if gate == "softplus":
        return F.softplus(logits)  # > 0, log 2 at 0
    if gate in ("sigmoid", "lerp"):
        return torch.sigmoid(logits)  # (0, 1)
    if gate == "tanh":
        return torch.tanh(logits)  # (-1, 1)
    if gate == "identity":
        return logits
    share = _softmax_over_heads(logits.float(), tp_group)  # mean 1 over heads
    if gate == "softmax_sigmoid":
        share = share * torch.sigmoid(logits.float())
    return share.to(logits.dtype)


def _softmax_over_heads(logits: Tensor, tp_group: ProcessGroup) -> Tensor:
    """Softmax over all ng heads times ng. [s, b, ng/tp] -> [s, b, ng/tp]."""
    every = all_gather_last_dim_from_tensor_parallel_region(logits, group=tp_group)  # [s, b, ng]
    heads = logits.size(-1)
    mine = tp_group.rank() * heads
    return every.softmax(dim=-1)[..., mine : mine + heads] * every.size(-1)


def own_random_state() -> Any:
    """That of this tensor-parallel rank, where the program has given it one."""
    tracker = get_cuda_rng_tracker()
    return tracker.fork() if tracker.is_initialized() else nullcontext()


@torch.no_grad()
def draw_apart(init_method: Callable[[Tensor], Any], shape: Sequence[int], place: int) -> Tensor:
    """Random values that leave those of all other weights what they are without them.

    Every architecture then begins with the same shared weights, given one seed.

    Args:
        init_method: fills a tensor.
        shape: of the whole tensor, over tensor-parallel ranks, which all draw the same.
        place: which tensor.
    """
    values = torch.empty(*shape, device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed((1_000_003 * torch.initial_seed() + place) % 2**63)
        init_method(values)
    return values


class _OfHeads(MegatronModule):
    """Parameters whose first axis is cut by KV head; `layer_number`: of the layer that has them."""

    def __init__(self, config: Any, tp_group: ProcessGroup, layer_number: int) -> None:
        super().__init__(config)
        self.tp_group, self.layer_number = tp_group, layer_number

    def add(self, name: str, *shape: int, fill: float | None = None) -> None:
        """Give it a parameter: filled with a number, or random as the model's other weights."""
        config = self.config
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        values = torch.zeros(shape, device=device, dtype=config.params_dtype)
        parameter: Any = torch.nn.Parameter(values)
        set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        if fill is not None:
            torch.nn.init.constant_(parameter, fill)
        elif config.perform_initialization:
            tp = self.tp_group
            whole = (shape[0] * tp.size(), *shape[1:])
            drawn = draw_apart(config.init_method, whole, -self.layer_number)
            values.copy_(drawn.chunk(tp.size())[tp.rank()])
        self.register_parameter(name, parameter)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Its parameters, cut by head."""
        parameters = dict(self.named_parameters())
        return make_sharded_tensors_for_checkpoint(
            parameters,
            prefix,
            dict.fromkeys(parameters, 0),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


class ConstantGate(_OfHeads):
    """A learned scalar per KV head, whatever the token.

    Args:
        config: gives dtype and device.
        heads: ng/tp.
        start: value of all.
        tp_group: over which the heads are sharded.
        layer_number: of the layer that has it.
    """

    def __init__(
        self, config: Any, heads: int, start: float, tp_group: ProcessGroup, layer_number: int
    ) -> None:
        super().__init__(config, tp_group, layer_number)
        self.add("alpha", heads, fill=start)

    def forward(self) -> Tensor:
        """[ng/tp, 1]."""
        return self.alpha.unsqueeze(-1)


class ChannelGate(_OfHeads):
    """sigma(W z + bias) per channel of V: the upper half of a low-rank map, as RWKV-7 has it.

    Under tensor parallelism z costs one all-gather of [s, b, r] and its reduce-scatter backward.

    Args:
        config: gives dtype, device, head dim and init.
        heads: ng/tp.
        rank: r.
        start: value of all biases.
        tp_group: over which heads and z are sharded.
        layer_number: of the layer that has it.
    """

    def __init__(
        self,
        config: Any,
        heads: int,
        rank: int,
        start: float,
        tp_group: ProcessGroup,
        layer_number: int,
    ) -> None:
        super().__init__(config, tp_group, layer_number)
        self.heads = heads
        self.add("weight", heads * config.kv_channels, rank)  # [kv/tp, r]
        self.add("bias", heads * config.kv_channels, fill=start)

    def forward(self, z: Tensor) -> Tensor:
        """[s, b, r/tp] -> [s, b, ng/tp, hn], (0, 1)."""
        whole = all_gather_last_dim_from_tensor_parallel_region(z, group=self.tp_group)
        return torch.sigmoid(F.linear(whole, self.weight, self.bias)).unflatten(
            -1, (self.heads, -1)
        )
