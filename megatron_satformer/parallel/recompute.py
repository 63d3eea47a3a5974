"""Full recompute of layers that carry a tuple of tensors.

megatron.core.recompute (0.19.2) hands `context` to tensor_parallel.checkpoint as one argument, and
save_for_backward takes tensors only. TransformerBlock calls it as a function of its module, so no
subclass reaches it: the narrowest place is the name under which it finds `checkpoint`.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import recompute, tensor_parallel
from torch.utils._pytree import tree_flatten, tree_unflatten


def activate() -> None:
    """Let full recompute take tuples; a second call changes nothing."""
    recompute.tensor_parallel = SimpleNamespace(
        checkpoint=checkpoint_nested, random=tensor_parallel.random
    )


def checkpoint_nested(
    function: Callable[..., Any], distribute_saved_activations: bool, *args: Any
) -> Any:
    """tensor_parallel.checkpoint for arguments and results that hold tuples of tensors.

    A result that is one of the arguments, handed on, does not pass through the checkpoint: its
    gradient goes straight to who made it.

    Args:
        function: called with `args`, once more in backward.
        distribute_saved_activations: as Megatron's.
        *args: tensors, None, or tuples of them.
    """
    flat, structure = tree_flatten(args)
    returned: dict[str, Any] = {}

    def run(*flat_args: Any) -> tuple[torch.Tensor, ...]:
        values, returned["structure"] = tree_flatten(
            function(*tree_unflatten(list(flat_args), structure))
        )
        places = {id(arg): place for place, arg in enumerate(flat_args) if torch.is_tensor(arg)}
        # Per value: (the place of the argument that it is, or None; what it is if no tensor).
        returned["plan"] = [
            (places.get(id(value)), None if torch.is_tensor(value) else (value,))
            for value in values
        ]
        pairs = zip(values, returned["plan"], strict=True)
        return tuple(value for value, plan in pairs if plan == (None, None))

    made = iter(tensor_parallel.checkpoint(run, distribute_saved_activations, *flat))
    values = [
        flat[place] if place is not None else constant[0] if constant else next(made)
        for place, constant in returned["plan"]
    ]
    return tree_unflatten(values, returned["structure"])
