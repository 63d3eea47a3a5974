"""A plan in words, every estimate beside what it assumes."""

from collections import Counter
from collections.abc import Iterator

from megatron_satformer.planning.hardware import GB
from megatron_satformer.planning.measure import Footprint, Message
from megatron_satformer.planning.plan import Plan, Stage

MIB = 2**20
HEADS = "stage layers parameters weights gradients optimizer activations in_flight all"
NOT_COUNTED = (
    "not counted with experts, for it depends on where tokens go: activations, FLOPs, messages and "
    "time"
)


def describe_plan(plan: Plan) -> str:
    """All of a plan.

    Args:
        plan: from `make_plan`.
    """
    lines = ["PLAN (counted on fake tensors; no GPU was used)", *_memory_table(plan)]
    full = max(range(len(plan.stages)), key=lambda n: plan.stages[n].bytes)
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    if plan.fits and plan.speed is None:
        verdict = "activations aside"
    lines.append(
        f"{verdict}: stage {full} needs {plan.stages[full].bytes / GB:.2f} of "
        f"{plan.memory / GB:g} GB on {plan.gpu.name}, CUDA and NCCL aside"
    )
    if plan.speed is None:
        return "\n".join([*lines, NOT_COUNTED])
    lines += [*_describe_flops(plan), *_describe_messages(plan), *_describe_time(plan)]
    return "\n".join(lines)


def _memory_table(plan: Plan) -> list[str]:
    """GB of one rank of each stage."""
    rows = [[head.replace("_", " ") for head in HEADS.split()]]
    for number, stage in enumerate(plan.stages):
        held = stage.held
        rows.append(
            [
                str(number),
                "+".join(_range(layers) for layers in stage.layers),
                f"{stage.parameters:,}",
                *(f"{size / GB:.2f}" for size in stage.static),
                f"{held.bytes / GB:.2f}" if held else "?",
                "+".join(str(held.flights[n]) for n in range(len(stage.chunks))) if held else "?",
                f"{stage.bytes / GB:.2f}" + " + ?" * (held is None),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return [
        "per rank, GB of 10^9 bytes; activations at their peak, temporary ones included:",
        *table,
    ]


def _range(layers: range) -> str:
    if not layers:
        return "none"
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])


def _describe_flops(plan: Plan) -> Iterator[str]:
    again = sum(chunk.recomputed_flops for _, chunk in _chunks(plan))
    once = sum(3 * chunk.forward_flops for _, chunk in _chunks(plan))
    yield (
        f"FLOPs per token: {plan.flops:,.0f} = {plan.plain_flops:,.0f} of a plain Transformer "
        f"{plan.flops - plan.plain_flops:+,.0f} that this model computes beside"
        + f"; {again / once:.1%} more to recompute"
        * bool(again)
    )


def _describe_messages(plan: Plan) -> Iterator[str]:
    for n, chunk in _chunks(plan):
        if chunk.sent:
            yield (
                f"boundary behind chunk {n}: {chunk.sent / MIB:.2f} MiB per micro-batch and rank, "
                "each way"
            )
    for n, stage in enumerate(plan.stages):
        messages = sum((chunk.messages for chunk in stage.chunks), Counter[Message]())
        told = ", ".join(f"{count} x {_message(one)}" for one, count in sorted(messages.items()))
        if told:
            yield f"collectives of stage {n}, per micro-batch: {told}"


def _message(message: Message) -> str:
    kind = message.kind.strip("_").replace("_", "-")
    return f"{kind} of {message.bytes / MIB:.2f} MiB over {message.ranks}"


def _chunks(plan: Plan) -> Iterator[tuple[int, Footprint]]:
    """All chunks in the order the model runs them."""
    stages = plan.stages
    for n in range(len(stages) * len(stages[0].chunks)):
        yield n, stages[n % len(stages)].chunks[n // len(stages)]


def _describe_time(plan: Plan) -> Iterator[str]:
    speed, (utilization, source) = plan.speed, plan.utilization
    assert speed is not None
    waiting = max(0.0, speed.step - speed.compute - speed.messages - speed.reduction)
    yield (
        f"step: {speed.step:.3f} s (estimated) = {speed.compute:.3f} compute + "
        f"{speed.messages:.3f} messages + {speed.reduction:.3f} gradients over data-parallel ranks "
        f"+ {waiting:.3f} waiting for other stages (bubble {speed.bubble:.1%} of "
        f"{plan.micro_batches} micro-batches)"
    )
    if plan.steps:
        hours = plan.steps * speed.step / 3600
        yield (
            f"run: {plan.steps:,} steps, {hours:.1f} hours = {hours / 24:.2f} days (estimated), "
            "evaluation and saves aside"
        )
    yield (
        f"assumed: MFU {utilization:.3f} of {plan.gpu.flops / 1e12:.0f} TFLOP/s, {source}; "
        f"{plan.gpu.inside / GB:.0f} GB/s between GPUs of a node of {plan.gpu.per_node}, "
        f"{plan.gpu.outside / GB:.0f} GB/s between nodes, nothing hidden but what "
        "--overlap-grad-reduce hides"
    )
    yield from (f"note: {note}" for note in plan.notes)


def fullest(plan: Plan) -> Stage:
    """The pipeline rank that needs most."""
    return max(plan.stages, key=lambda stage: stage.bytes)
