"""Bytes that a rank needs whatever it computes: weights, gradients, the optimizer's state.

As the DistributedDataParallel and the optimizers of Megatron (0.19.2) hold them. Must not know:
schedules, GPUs.
"""

from argparse import Namespace
from typing import NamedTuple

import torch

from megatron_satformer.config import DecoderConfig


class Static(NamedTuple):
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int


def count_static(
    args: Namespace, config: DecoderConfig, parameters: int, expert_parameters: int
) -> Static:
    """What is held between steps.

    Args:
        args: Megatron's validated arguments.
        config: the model.
        parameters: on the rank, without experts.
        expert_parameters: on the rank.

    Raises:
        NotImplementedError: an optimizer whose state is not known here.
    """
    size, count = config.params_dtype.itemsize, parameters + expert_parameters
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 else size
    state = _state(args, config)
    shared = expert_shared = 1
    if args.use_distributed_optimizer:
        shared = args.data_parallel_size * args.context_parallel_size
        experts = args.expert_model_parallel_size * (args.expert_tensor_parallel_size or 1)
        expert_shared = args.world_size // (experts * args.pipeline_model_parallel_size)
    held = -(-parameters // shared) + -(-expert_parameters // expert_shared)
    return Static(count * size, count * gradient, held * state)


def _state(args: Namespace, config: DecoderConfig) -> int:
    """Bytes of the optimizer per parameter."""
    for option in ("optimizer_cpu_offload", "use_megatron_fsdp", "use_torch_fsdp2"):
        if getattr(args, option, False):
            raise NotImplementedError(
                f"{option} (True) is not planned: where what it moves lies is not known here. "
                "Leave it out of the plan."
            )
    low = config.params_dtype != torch.float32
    if args.optimizer == "adam":
        masters = args.main_params_dtype.itemsize if low else 0
        return masters + args.exp_avg_dtype.itemsize + args.exp_avg_sq_dtype.itemsize
    if args.optimizer == "sgd":
        return 4 * low + 4 * (args.sgd_momentum > 0)
    raise NotImplementedError(
        f"optimizer ({args.optimizer}) is not planned: its state is not known here. Plan with "
        "--optimizer adam, which holds no less."
    )
