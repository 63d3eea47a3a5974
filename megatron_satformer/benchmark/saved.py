"""What a forward pass keeps for its backward pass, counted exactly: whole storages, each once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def bytes_saved(model: torch.nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps when `forward` has run; parameters are kept anyway.

    A view counts as all of the memory that it is a view of, and memory that has been given back in
    the meantime not at all.
    """
    known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage  # held, so that no later one has its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()  # held, as what it has kept is
    total = sum(storage.nbytes() for storage in kept.values())
    del output
    return total
