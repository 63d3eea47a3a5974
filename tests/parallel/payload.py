"""What test_payload.py runs on forked ranks: pretrain_satformer.main(), everything sent counted.

Functions of Megatron and torch are wrapped, never replaced: what is counted really happens.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import p2p_communication
from megatron.training import training
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain_satformer

# Arguments of Megatron's two functions that start messages, 0.19.2.
MESSAGES = {
    "tensor_send_next": ("forward", "sent", "next_pipeline_rank"),
    "tensor_recv_prev": ("forward", "received", "prev_pipeline_rank"),
    "tensor_send_prev": ("backward", "sent", "prev_pipeline_rank"),
    "tensor_recv_next": ("backward", "received", "next_pipeline_rank"),
}
# Operators that make a GPU's host wait for a value.
HOST_READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal")


class Traffic(TorchDispatchMode):
    """Counts, below every Python wrapper, what torch sends and where the host reads a value."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[str] = Counter()  # "operator group size x elements"
        self.sent = {"messages": 0, "bytes": 0}  # point to point, whoever asked for it
        self.received = {"messages": 0, "bytes": 0}
        self.host_reads = 0
        self.synchronises = 0
        self.messages: list[list[Any]] = []  # direction, sent or received, peer, shape, bytes

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = str(operator).rsplit(".", 1)[0]
        if name in ("c10d.send", "c10d.recv_"):
            count = self.sent if name == "c10d.send" else self.received
            count["messages"] += 1
            count["bytes"] += sum(tensor.nbytes for tensor in args[0])
        elif name.startswith("c10d."):
            self._count_collective(name, args)
        self.host_reads += name in HOST_READS
        return operator(*args, **(kwargs or {}))

    def _count_collective(self, name: str, args: tuple) -> None:
        (group,) = (arg for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg))
        size = torch.distributed.ProcessGroup.unbox(group).size()
        tensors = args[0] if isinstance(args[0], list | tuple) else [args[0]]
        # A group of one sends nothing; its gradient buckets do differ between architectures.
        elements = sum(tensor.numel() for tensor in tensors) if size > 1 else "any"
        self.collectives[f"{name} over {size} ranks x {elements}"] += 1

    def as_record(self, **more: Any) -> dict[str, Any]:
        names = "collectives sent received host_reads synchronises messages".split()
        return {name: getattr(self, name) for name in names} | more


def _is_group(argument: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(argument._type())


def count(record: str, argv: list[str], megatrons_own: bool) -> None:
    """Run main() and write what every schedule and every step has sent.

    Args:
        record: file to write, as JSON, with ".<rank>" appended.
        argv: flags of pretrain_satformer.py.
        megatrons_own: let Megatron make the communicator, as it does for pretrain_gpt.py.
    """
    schedules: list[dict] = []  # one per forward_backward, training or evaluation
    steps: list[dict] = []  # one per train_step: its schedule, the optimizer, the reductions
    active: list[Traffic] = []
    _record_messages(active)
    _record_schedules(active, schedules)
    plain_step = training.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        with Traffic() as traffic:
            result = plain_step(*args, **kwargs)
        steps.append(traffic.as_record())
        return result

    training.train_step = train_step
    if megatrons_own:
        _without_our_communicator()
    sys.argv = ["pretrain_satformer.py", *argv]
    pretrain_satformer.main()
    report = {"schedules": schedules, "steps": steps}
    Path(f"{record}.{os.environ['RANK']}").write_text(json.dumps(report))


def _record_messages(active: list[Traffic]) -> None:
    for name in ("_p2p_ops", "_batched_p2p_ops"):
        plain = getattr(p2p_communication, name)
        setattr(p2p_communication, name, _recording(plain, active))


def _recording(plain: Callable[..., Any], active: list[Traffic]) -> Callable[..., Any]:
    def start(**kwargs: Any) -> Any:
        for argument, (direction, way, peer) in MESSAGES.items():
            tensor = kwargs[argument]
            if tensor is not None:
                message = [direction, way, kwargs[peer], list(tensor.shape), tensor.nbytes]
                active[-1].messages.append(message)
        return plain(**kwargs)

    return start


def _record_schedules(active: list[Traffic], schedules: list[dict]) -> None:
    plain_get = training.get_forward_backward_func

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        plain = plain_get(*args, **kwargs)

        def forward_backward(**kwargs: Any) -> Any:
            plain_synchronize = torch.cuda.synchronize  # the CPU backend's by now
            with Traffic() as traffic:

                def synchronize(*args: Any, **kwargs: Any) -> None:
                    traffic.synchronises += 1
                    plain_synchronize(*args, **kwargs)

                active.append(traffic)
                torch.cuda.synchronize = synchronize
                try:
                    return plain(**kwargs)
                finally:
                    torch.cuda.synchronize = plain_synchronize
                    active.pop()
                    schedules.append(traffic.as_record(forward_only=kwargs["forward_only"]))

        return forward_backward

    training.get_forward_backward_func = get_forward_backward_func


def _without_our_communicator() -> None:
    plain = pretrain_satformer.pretrain

    def pretrain(*args: Any, p2p_communicator: Any = None, pg_collection: Any = None) -> Any:
        return plain(*args)

    pretrain_satformer.pretrain = pretrain
