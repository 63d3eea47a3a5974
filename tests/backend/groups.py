"""What test_parameter_groups.py runs on forked ranks: training, the optimizer's groups recorded."""

import json
import os
import sys
from pathlib import Path

from megatron.training import training

import pretrain_satformer


def record(path: str, argv: list[str]) -> None:
    """Run main() and write, of every step, what each group was stepped with.

    Args:
        path: file to write, as JSON, with ".<rank>" appended.
        argv: flags of pretrain_satformer.py.
    """
    steps = []
    plain = training.train_step

    def train_step(*args, **kwargs):
        optimizer = args[3]
        groups = [
            {
                "lr": group["lr"],
                "weight_decay": group["weight_decay"],
                "numbers": sum(parameter.numel() for parameter in group["params"]),
            }
            for group in optimizer.param_groups
        ]
        steps.append(groups)
        Path(f"{path}.{os.environ['RANK']}").write_text(json.dumps(steps))  # it may exit in main
        return plain(*args, **kwargs)

    training.train_step = train_step
    sys.argv = ["pretrain_satformer.py", *argv]
    pretrain_satformer.main()
