"""Learned coefficients that every tensor-parallel rank holds whole, and whose gradient is whole.

Scalars are flat vectors: Megatron (0.19.2) exempts what has one axis from weight decay, and decays
projections. In the dtype of the other parameters, with an fp32 master in the optimizer: mixed
dtypes make the distributed optimizer pair states with the wrong parameters. Must not know:
architectures.
"""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup


def stream_coefficients(config: TransformerConfig, values: Any) -> torch.nn.Parameter:
    """Coefficients of tensors like hidden_states.

    Under sequence parallelism a rank's gradient is the sum over its part of the sequence, and
    Megatron adds up those of parameters tagged so; without, every rank has the whole one.

    Args:
        config: gives dtype, device and sequence parallelism.
        values: at the start, a number or a sequence of them; flattened.
    """
    return stream_projection(config, torch.as_tensor(values, device="cpu").flatten())


def stream_projection(config: TransformerConfig, values: Tensor) -> torch.nn.Parameter:
    """A matrix applied to tensors like hidden_states; as `stream_coefficients`, but decayed.

    Args:
        config: gives dtype, device and sequence parallelism.
        values: at the start, the same on every rank.
    """
    parameter = _replicated(config, values)
    parameter.sequence_parallel = config.sequence_parallel
    return parameter


def head_coefficients(config: TransformerConfig, values: Any) -> torch.nn.Parameter:
    """Coefficients of tensors that are sharded by KV head; use them through `summed_over_heads`.

    Args:
        config: gives dtype and device.
        values: at the start, a number or a sequence of them; flattened.
    """
    parameter = _replicated(config, torch.as_tensor(values, device="cpu").flatten())
    parameter.average_gradients_across_tp_domain = True
    return parameter


def summed_over_heads(parameter: Tensor, tp_group: ProcessGroup) -> Tensor:
    """The parameter, its gradient scaled so that Megatron's average over tp is a sum.

    Megatron (0.19.2) averages the gradients of replicated parameters marked
    `average_gradients_across_tp_domain` over tensor-parallel ranks in one coalesced call per step;
    heads are sharded, so what is wanted is the sum, and no collective per layer.

    Args:
        parameter: from `head_coefficients`.
        tp_group: over which the heads are sharded.
    """
    size = tp_group.size()
    if size == 1 or not parameter.requires_grad:
        return parameter
    scaled = parameter.view_as(parameter)
    scaled.register_hook(lambda gradient: gradient * size)
    return scaled


def _replicated(config: TransformerConfig, values: Tensor) -> Any:
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    return torch.nn.Parameter(values.to(device, config.params_dtype, copy=True))
