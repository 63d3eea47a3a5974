"""What tests of the model run on forked ranks: bytes that autograd keeps until backward."""

from typing import Any

import torch

from tests.model import ranks


def grows_by(architecture: str, options: dict[str, Any], more: float) -> None:
    """It grows evenly with depth, per layer by `more` [s, b, kv] beyond a Transformer's."""
    ranks.start()
    depths = (4, 8, 12)
    shape = ranks.SHAPE | options
    kept, plain = (
        [_kept(shape | {"architecture": name, "num_layers": n}) for n in depths]
        for name in (architecture, "transformer")
    )
    assert kept[2] - kept[1] == kept[1] - kept[0]
    kv = shape["num_query_groups"] * shape["kv_channels"]
    unit = 4 * ranks.SEQUENCE * ranks.BATCH * kv  # bytes of one [s, b, kv]
    per_layer = [(of[1] - of[0]) / (depths[1] - depths[0]) / unit for of in (kept, plain)]
    assert per_layer[0] - per_layer[1] == more


def _kept(options: dict[str, Any]) -> int:
    model = ranks.build(options)
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that no later one has its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ranks.mean_loss(model)
    return sum(storage.nbytes() for storage in kept.values())
