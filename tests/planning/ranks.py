"""What tests of plans run on forked ranks (see tests/zygote.py): the plan, and the run itself."""

import io
import json
import os
import sys
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.training import training

import pretrain_satformer
from megatron_satformer import arguments, metrics
from megatron_satformer.backend.device import choose_device
from megatron_satformer.planning.fake_ranks import pretend_ranks
from megatron_satformer.planning.measure import Ledger, Message
from megatron_satformer.planning.plan import Plan, make_plan
from tests.parallel.liveness import Storages
from tests.parallel.payload import Traffic


def plan_of(argv: list[str]) -> Plan:
    """The plan of a command line; any number in one process."""
    sys.argv = ["pretrain_satformer.py", *argv, "--dry-run"]
    choose_device("cpu")
    metrics.hold_writers()
    preview = arguments.preview_arguments()
    with pretend_ranks(preview), redirect_stdout(io.StringIO()):
        args, model = pretrain_satformer.resolve(preview, preview.device != "cpu")
        plan = make_plan(args, model)
    metrics.forget_run()
    return plan


def predict(record: str, argv: list[str], ranks: int) -> None:
    """Writes the numbers that `run` writes, of one rank of every pipeline stage."""
    plan = plan_of([*argv, "--gpus", str(ranks)])
    found = []
    for stage in plan.stages:
        collectives: Counter[str] = Counter()
        for chunk in stage.chunks:
            for message, n in chunk.messages.items():
                collectives[_named(message)] += n * plan.micro_batches
        crossing = sum(chunk.sent + chunk.received for chunk in stage.chunks)
        found.append(
            {
                "parameters": stage.parameters,
                "static": stage.static,
                "kept": stage.held and stage.held.kept,
                "peak": stage.held and stage.held.bytes,
                "sent": 2 * crossing * plan.micro_batches,  # and the gradients back
                "collectives": collectives,
            }
        )
    Path(record).write_text(json.dumps(found))


def _named(message: Message) -> str:
    return f"{message.kind} {message.ranks} {message.bytes}"


def counts_flops() -> None:
    """Of a Transformer the formula, for any shape; with a gate its GEMM's rows, padded to 16."""
    base = """--model-size debug --mock-data --tokenizer-type NullTokenizer --vocab-size 1023
    --micro-batch-size 1 --global-batch-size 1 --gpus""".split()
    shapes = "1", "1 --no-swiglu", "1 --kv-channels 24 --group-query-attention --num-query-groups 2"
    for shape in shapes:
        plan = plan_of([*base, *shape.split(), "--architecture", "transformer"])
        assert plan.flops == plan.plain_flops, shape
    gated = plan_of([*base, "1", "--architecture", "satformer"])
    assert gated.plain_flops == plan_of([*base, "1", "--architecture", "transformer"]).flops
    assert gated.flops - gated.plain_flops == 6 * 256 * 16 * 3  # hidden size, three layers mix
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    (stage,) = plan_of([*base, "1", "--architecture", "transformer", *full.split()]).stages
    loss = 2 * 256 * 256 * 1024  # sequence, hidden size, vocabulary
    assert stage.chunks[0].recomputed_flops == stage.chunks[0].forward_flops - loss


def run(record: str, argv: list[str]) -> None:
    """Runs main() and writes what its second step really held and sent, on every rank."""
    found: dict[str, Any] = {}
    plain_step, plain_get = training.train_step, training.get_forward_backward_func
    plain_forward = schedules.forward_step
    ledger, storages, traffic = Ledger(), _NewStorages(), Traffic()
    alive: list[tuple[int, int]] = []

    def forward_step(*args: Any, **kwargs: Any) -> Any:
        result = plain_forward(*args, **kwargs)
        alive.append((ledger.alive, storages.bytes_alive(least=0)))
        return result

    def train_step(*args: Any, **kwargs: Any) -> Any:
        result = plain_step(*args, **kwargs)
        if "peak" in found and "static" not in found:
            found["parameters"] = sum(p.numel() for chunk in args[2] for p in chunk.parameters())
            found["static"] = _static(args[2], args[3])
        return result

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        plain = plain_get(*args, **kwargs)

        def forward_backward(**kwargs: Any) -> Any:
            if not found.get("steps"):
                found["steps"] = 1
                return plain(**kwargs)
            if "peak" in found:
                return plain(**kwargs)
            there = _there_already(kwargs["model"])
            ledger.ignore(there)
            storages.ignored = frozenset(t.untyped_storage()._cdata for t in there)
            with ledger, storages, traffic, ledger.peak() as peak:
                result = plain(**kwargs)
            found["peak"], found["kept"] = peak[0], max(kept for kept, _ in alive)
            found["alive"] = alive
            found["sent"] = traffic.sent["bytes"] + traffic.received["bytes"]
            found["collectives"] = {_named(m): n for m, n in ledger.messages.items()}
            return result

        return forward_backward

    training.train_step, schedules.forward_step = train_step, forward_step
    training.get_forward_backward_func = get_forward_backward_func
    sys.argv = ["pretrain_satformer.py", *argv]
    pretrain_satformer.main()
    Path(f"{record}.{os.environ['RANK']}").write_text(json.dumps(found))


class _NewStorages(Storages):
    ignored: frozenset[int] = frozenset()

    def bytes_alive(self, least: int = 0) -> int:
        for key in self.ignored:
            self.known.pop(key, None)
        return super().bytes_alive(least)


def _buffers(model: list[Any]) -> list[Any]:
    return [b for chunk in model for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def _there_already(model: list[Any]) -> list[torch.Tensor]:
    there = [buffer.grad_data for buffer in _buffers(model)]
    for chunk in model:
        there += [*chunk.module.parameters(), *chunk.module.buffers()]
    return there


def _static(model: list[Any], optimizer: Any) -> list[int]:
    parameters = [p for chunk in model for p in chunk.parameters()]
    mine = {p.untyped_storage()._cdata for p in parameters}
    held = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            for master in group["params"]:
                held += master.nbytes * (master.untyped_storage()._cdata not in mine)
                state = part.optimizer.state[master].values()
                held += sum(t.nbytes for t in state if torch.is_tensor(t) and t.dim())
    weights = sum(p.nbytes for p in parameters)
    return [weights, sum(buffer.grad_data.nbytes for buffer in _buffers(model)), held]
