"""Layouts that fit, the fastest first, and why the others do not.

Must not know: how arguments are parsed; it asks for a plan by flags, as a person would.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import NamedTuple

from megatron_satformer.cli import USER_ERRORS
from megatron_satformer.planning.hardware import GB, find_gpu
from megatron_satformer.planning.plan import Plan
from megatron_satformer.planning.report import fullest

FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
BEST = 10


class Tried(NamedTuple):
    """One layout: its flags, and its plan or why it has none."""

    flags: str
    plan: Plan | None
    reason: str = ""


def search_layouts(args: Namespace, plan_of: Callable[[list[str]], Plan]) -> Iterator[Tried]:
    """Tries every tensor- and pipeline-parallel size: powers of two, the first within a node.

    Of each the plan without recompute, or with where that does not fit, and of those the one with
    the largest micro-batch, that of the run or a half, a quarter ... of it.

    Args:
        args: arguments of the run itself, as given.
        plan_of: flags that come behind those of the run -> its plan; raises what a run raises.
    """
    if args.num_layers is None or args.micro_batch_size is None or args.num_experts:
        raise ValueError(
            f"search (True) must come with num_layers ({args.num_layers}) and micro_batch_size "
            f"({args.micro_batch_size}), and without num_experts ({args.num_experts}), whose "
            "activations are not counted. Change them, or leave --search out."
        )
    per_node = find_gpu(args.gpu).per_node
    for tp in _powers(min(args.world_size, per_node)):
        for pp in _powers(min(args.world_size // tp, args.num_layers)):
            yield _try_layout(args, plan_of, tp, pp)


def _powers(most: int) -> list[int]:
    return [1 << n for n in range(most.bit_length())]


def _try_layout(args: Namespace, plan_of: Callable[[list[str]], Plan], tp: int, pp: int) -> Tried:
    """The first of its micro-batches and recomputes that fits, else why the last does not."""
    short = f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp}"
    base = f"{short} {'--sequence-parallel ' * (tp > 1)}--use-distributed-optimizer"
    reason, too_large = "", False
    for recompute in ["", FULL] if args.recompute_granularity is None else [""]:
        for micro in reversed(_powers(args.micro_batch_size)):
            flags = f"{base} --micro-batch-size {micro} {recompute}".strip()
            try:
                plan = plan_of(flags.split())
            except (*USER_ERRORS, AssertionError) as error:
                reason = " ".join(str(error).split())
                continue
            if plan.fits:
                return Tried(flags, plan)
            stage, limit, too_large = fullest(plan), f"{plan.memory / GB:g} GB", True
            if sum(stage.static) > plan.memory:
                held = sum(stage.static) / GB
                told = f"weights, gradients and optimizer alone need {held:.1f} of {limit}"
                return Tried(short, None, told)
            least = flags.removeprefix(base).strip()
            reason = f"needs {stage.bytes / GB:.2f} of {limit} with {least}"
        if not too_large:
            break  # it is refused, and would be with recompute
    return Tried(short, None, reason)


def describe_search(found: list[Tried]) -> str:
    """The best layouts, and the others with their reason.

    Args:
        found: from `search_layouts`.
    """
    fitting = sorted(
        (tried for tried in found if tried.plan),
        key=lambda tried: tried.plan.speed.step,  # type: ignore[union-attr]
    )
    lines = [f"SEARCH: {len(fitting)} of {len(found)} layouts fit; the fastest, by estimate:"]
    for tried in fitting[:BEST]:
        plan = tried.plan
        assert plan is not None
        assert plan.speed is not None
        lines.append(
            f"{plan.speed.step:9.3f} s a step, {fullest(plan).bytes / GB:6.1f} GB, bubble "
            f"{plan.speed.bubble:5.1%}: {tried.flags}"
        )
    others = [tried for tried in found if tried.plan is None]
    lines += ["why others do not:"] * bool(others)
    lines += [f"  {tried.flags}: {tried.reason}" for tried in others]
    if not fitting:
        lines.append("None fits: use more GPUs, or ones with more memory.")
    return "\n".join(lines)
