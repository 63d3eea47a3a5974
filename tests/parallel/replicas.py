"""What test_replicas.py runs on forked ranks: main(), and every copy compared behind it."""

import hashlib
import sys

import torch

import pretrain_satformer
from megatron_satformer.parallel import replicas


def train(argv: list[str]) -> None:
    """pretrain_satformer.main(); the copies of all stages end with the same bits."""
    made = []
    make_equal, pretrain = replicas.Copies.make_equal, pretrain_satformer.pretrain

    def make_equal_and_tell(copies):
        make_equal(copies)
        made.append(copies)

    def pretrain_and_compare(*args, **kwargs):
        pretrain(*args, **kwargs)
        (copies,) = made
        compare(copies)

    replicas.Copies.make_equal = make_equal_and_tell
    pretrain_satformer.pretrain = pretrain_and_compare
    sys.argv = ["pretrain_satformer.py", *argv]
    pretrain_satformer.main()


def compare(copies: replicas.Copies) -> None:
    mine = {
        name: [hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for p in parameters]
        for name, parameters in copies.here.items()
    }
    stages = [None] * copies.stages.size()
    torch.distributed.all_gather_object(stages, mine, group=copies.stages)
    for name in copies.owners:
        found = [bits for stage in stages for bits in stage.get(name, ())]
        assert len(found) > 1
        assert len(set(found)) == 1, name
