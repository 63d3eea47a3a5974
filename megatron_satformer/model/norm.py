"""Norms of the local backend: torch's own, usable under sequence parallelism."""

import torch
from megatron.core.transformer import TransformerConfig


def build_norm(*, config: TransformerConfig, hidden_size: int, eps: float) -> torch.nn.Module:
    """torch.nn.RMSNorm or LayerNorm as `config.normalization` says.

    Megatron's own wrapper of the same torch classes refuses sequence parallelism; all it takes is
    to mark the parameters, whose gradients are then partial sums over the sequence.

    Args:
        config: gives normalization, dtype and sequence parallelism.
        hidden_size: size of the normalised last axis (h, or hn for q and k).
        eps: added to the mean square.

    Raises:
        NotImplementedError: layernorm_zero_centered_gamma, which torch's norms do not have.
    """
    if config.layernorm_zero_centered_gamma:
        raise NotImplementedError(
            "apply_layernorm_1p (True) is not part of torch's norms. Leave it out, or use "
            "--transformer-impl transformer_engine."
        )
    cls = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}[config.normalization]
    norm = cls(hidden_size, eps=eps, dtype=config.params_dtype, device=_device(config))
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


def _device(config: TransformerConfig) -> torch.device | str | int:
    return "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
