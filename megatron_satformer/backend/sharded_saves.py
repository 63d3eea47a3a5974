"""Copies of one parameter on one rank, which Megatron's parallel checkpoints (0.19.2) know not.

An interleaved schedule puts chunks on one rank that have copies of one parameter: ResFormer's
shared lambdas, or what makes V1 from token ids. On several data-parallel ranks

- --ckpt-fully-parallel-save (the default) gives each shard to one of them to write, and marks every
  entry of that shard there as the one to be written: it would be written twice, and the save fails;
- --ckpt-fully-parallel-load hands one tensor to all entries of a shard, and torch's optimizers keep
  what they load: two copies would share their moments.
"""

from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.utils import _sharded_tensor_shard_id
from torch import Tensor

_plain_apply = FullyParallelSaveStrategyWrapper.apply_saving_parallelization
_plain_fill = FullyParallelLoadStrategyWrapper.fill_in_deferred_sharded_tensors


def activate() -> None:
    """Mend both; once per process, a second call changes nothing."""
    FullyParallelSaveStrategyWrapper.apply_saving_parallelization = _apply
    FullyParallelLoadStrategyWrapper.fill_in_deferred_sharded_tensors = staticmethod(_fill)


def _apply(self: FullyParallelSaveStrategyWrapper, sharded_state_dict: ShardedStateDict) -> None:
    once, again = _split(sharded_state_dict)
    _plain_apply(self, once)  # it only sets replica_id
    for tensor in again:
        tensor.replica_id = 1


def _fill(sharded_state_dict: ShardedStateDict, loaded_tensors: dict[Any, Tensor]) -> None:
    _plain_fill(sharded_state_dict, loaded_tensors)
    given: set[int] = set()

    def once(tensor: Any) -> Any:
        if id(tensor) in given:
            return tensor.clone()
        given.add(id(tensor))
        return tensor

    dict_list_map_inplace(once, sharded_state_dict)


def _split(sharded_state_dict: ShardedStateDict) -> tuple[list[Any], list[ShardedTensor]]:
    """Entries of which this rank has no other before, and the rest; chunks come in model order."""
    found, once, again = set(), [], []
    for entry in nested_values(sharded_state_dict):
        shard = _sharded_tensor_shard_id(entry) if isinstance(entry, ShardedTensor) else None
        if shard in found:
            again.append(entry)
            continue
        once.append(entry)
        if shard is not None:
            found.add(shard)
    return once, again
