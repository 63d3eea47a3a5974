"""Two copies of a parameter on one rank; that Megatron writes one, runs show (test_resharding)."""

import inspect

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import fully_parallel
from megatron.core.dist_checkpointing.utils import _sharded_tensor_shard_id

from megatron_satformer.backend import sharded_saves


def test_every_entry_of_a_shard_is_still_marked():
    source = inspect.getsource(
        fully_parallel.distribute_main_replicas_with_precomputed_distribution
    )
    assert "sh_ten.replica_id = 0" in source


@pytest.mark.parametrize("fill", [sharded_saves._plain_fill, sharded_saves._fill])
def test_copies_are_loaded_apart(fill):
    copies = [
        ShardedTensor.from_rank_offsets("key", torch.zeros(3), replica_id=n) for n in range(3)
    ]
    loaded = torch.arange(3.0)
    chunks = {"first": {"a": copies[0]}, "second": [copies[1], copies[2]]}
    fill(chunks, {_sharded_tensor_shard_id(copies[0]): loaded})
    given = [chunks["first"]["a"], *chunks["second"]]
    assert all(torch.equal(tensor, loaded) for tensor in given)
    apart = len({tensor.data_ptr() for tensor in given}) == 3
    assert apart is (fill is sharded_saves._fill)  # Megatron's own still hands out one tensor
