"""What crosses a stage boundary: the formula of the carry, and no message more than Megatron's.

Every case runs pretrain_satformer.main() for two training steps and two evaluations and counts,
on every rank, each message with its direction, peer, shape and bytes (see payload.py).
"""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import pytest

from megatron_satformer.model.architectures import PLAIN, TABLE, find_architecture
from tests.models import build_config
from tests.parallel.layouts import DILATED, EVERY_CELL, GATED, MIXING, STREAMED, WITH_HEADS
from tests.small import PP2, SHAPE, SP, TP2

HIDDEN, SEQUENCE, BATCH, MICRO_BATCHES = 64, 64, 2, 4  # as SHAPE has them
HEADS, HEAD_DIM = 8, 8
FLAGS = [*SHAPE, *f"--num-attention-heads {HEADS} --train-iters 2".split()]
FLAGS += "--mock-data --tokenizer-type NullTokenizer --vocab-size 127".split()


@dataclass(frozen=True)
class Layout:
    """Flags of a layout and what they mean, told apart from how Megatron reads them."""

    flags: str
    pp: int
    tp: int = 1
    sp: bool = False
    virtual: int = 1
    layers: int = 4
    chunks: tuple[int, ...] = ()  # layers of each, where they differ

    @property
    def ranks(self) -> int:
        return self.tp * self.pp

    @property
    def layers_before(self) -> list[int]:
        """Of every boundary."""
        chunks = self.pp * self.virtual
        counts = self.chunks or (self.layers // chunks,) * chunks
        return [*accumulate(counts)][:-1]


@dataclass(frozen=True)
class Model:
    """An architecture, its KV heads, and options of its own."""

    architecture: str
    groups: int = HEADS
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def flags(self) -> list[str]:
        words = f"--architecture {self.architecture}"
        if self.groups != HEADS:
            words += f" --group-query-attention --num-query-groups {self.groups}"
        for name, value in self.options:
            words += f" --{name.replace('_', '-')} {value}"
        return words.split()

    def config(self, layout: Layout) -> Any:
        shape = {"num_layers": layout.layers, "hidden_size": HIDDEN, "num_attention_heads": HEADS}
        return build_config(self.architecture, **shape, **dict(self.options))


LAYOUTS = {
    "PP2": Layout(PP2, pp=2),
    "PP4": Layout("--pipeline-model-parallel-size 4", pp=4, layers=8),
    "PP2 x 2 virtual": Layout(f"{PP2} --num-layers-per-virtual-pipeline-stage 1", pp=2, virtual=2),
    "PP4 x 2 virtual": Layout(
        "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 1",
        pp=4,
        virtual=2,
        layers=8,
    ),
    "PP4 x 2 virtual, batched": Layout(
        "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 1 "
        "--no-overlap-p2p-communication",
        pp=4,
        virtual=2,
        layers=8,
    ),
    "TP2 x PP2": Layout(f"{TP2} {PP2}", pp=2, tp=2),
    "TP2 x PP2 + SP": Layout(f"{TP2} {PP2} {SP}", pp=2, tp=2, sp=True),
    "TP2 x PP2 x 2 virtual + SP": Layout(
        f"{TP2} {PP2} {SP} --num-layers-per-virtual-pipeline-stage 1",
        pp=2,
        tp=2,
        sp=True,
        virtual=2,
    ),
    # Chunks without layers: nothing is carried before layer 1 and behind the last.
    "PP4, E|tt|tt|L": Layout(
        "--pipeline-model-parallel-size 4 --pipeline-model-parallel-layout E|tt|tt|L",
        pp=4,
        chunks=(0, 2, 2, 0),
    ),
    "PP4, Et|tt|t|L": Layout(
        "--pipeline-model-parallel-size 4 --pipeline-model-parallel-layout Et|tt|t|L",
        pp=4,
        chunks=(1, 2, 1, 0),
    ),
    "PP2 x 2, E|tt|tt|L": Layout(
        f"{PP2} --pipeline-model-parallel-layout E|tt|tt|L", pp=2, virtual=2, chunks=(0, 2, 2, 0)
    ),
}
MODELS = {name: Model(name) for name in TABLE}
MODELS |= {f"{name}, GQA": Model(name, HEADS // 4) for name in WITH_HEADS}
MODELS |= {
    f"{name}, 2 x 3": Model(name, options=(("dwa_dilation", 2), ("dwa_period", 3)))
    for name in DILATED
}
MODELS |= {
    f"{name}, last layer mixes": Model(name, options=(("value_residual_last_k", 1),))
    for name in GATED
}
FAST = [
    ("PP2", PLAIN),
    *(("PP2 x 2 virtual", f"{name}, GQA") for name in GATED),
    *(("TP2 x PP2 + SP", f"{name}, GQA") for name in GATED),
]


@dataclass
class Record:
    """What `payload.count` wrote, one entry per rank, and what rank 0 printed."""

    ranks: list[dict]
    output: str

    def of(self, rank: int, *names: str) -> list:
        return [[schedule[name] for name in names] for schedule in self.ranks[rank]["schedules"]]


@pytest.fixture(scope="module")
def recorded(zygote, tmp_path_factory):
    """Runs a layout and a model once; `megatrons_own` is plain Megatron's communicator."""
    made: dict[tuple, Record] = {}

    def run(layout: Layout, *flags: str, megatrons_own: bool = False) -> Record:
        key = (layout, flags, megatrons_own)
        if key not in made:
            path = tmp_path_factory.mktemp("traffic") / "record"
            argv = [*FLAGS, "--num-layers", str(layout.layers), *layout.flags.split(), *flags]
            job = zygote.run(
                layout.ranks,
                call="tests.parallel.payload:count",
                args=[str(path), argv, megatrons_own],
            )
            assert job.codes == [0] * layout.ranks, job.output[-6000:]
            ranks = [json.loads(path.with_suffix(f".{n}").read_text()) for n in range(layout.ranks)]
            made[key] = Record(ranks, job.output)
        return made[key]

    return run


@pytest.fixture(scope="module")
def plain(recorded):
    """The plain Transformer in the same layout, by Megatron's own communicator."""
    return lambda layout, *flags: recorded(
        layout, "--architecture", "transformer", *flags, megatrons_own=True
    )


def boundary_width(layout: Layout, model: Model, boundary: int) -> int:
    """The formula of docs/design.md, written out once more; what is carried is the record's."""
    before = layout.layers_before[boundary]
    if before in (0, layout.layers):
        return HIDDEN
    carry = find_architecture(model.architecture).carry
    streams, heads = carry(model.config(layout), before)
    kv = model.groups * HEAD_DIM
    return HIDDEN * (1 + streams) + heads * (kv if layout.sp else kv // layout.tp)


def messages_of_one_micro_batch(
    layout: Layout, model: Model, rank: int, forward_only: bool, itemsize: int = 4
) -> Counter:
    """(direction, sent or received, peer, shape, bytes) of one micro-batch on one rank."""
    rows = SEQUENCE // layout.tp if layout.sp else SEQUENCE
    stage, tp_rank = divmod(rank, layout.tp)
    expected: Counter = Counter()
    for boundary in range(layout.pp * layout.virtual - 1):
        width = boundary_width(layout, model, boundary)
        what = ((rows, BATCH, width), rows * BATCH * width * itemsize)
        before, behind = boundary % layout.pp, (boundary + 1) % layout.pp
        if stage == before:
            peer = behind * layout.tp + tp_rank
            expected["forward", "sent", peer, *what] += 1
            expected["backward", "received", peer, *what] += not forward_only
        if stage == behind:
            peer = before * layout.tp + tp_rank
            expected["forward", "received", peer, *what] += 1
            expected["backward", "sent", peer, *what] += not forward_only
    return +expected


def check_messages(record: Record, layout: Layout, model: Model, **more) -> None:
    for rank in range(layout.ranks):
        schedules = record.ranks[rank]["schedules"]
        assert [s["forward_only"] for s in schedules] == [False, False, True, True]
        for schedule in schedules:
            one = messages_of_one_micro_batch(layout, model, rank, schedule["forward_only"], **more)
            got = Counter(
                (d, way, peer, tuple(shape), n) for d, way, peer, shape, n in schedule["messages"]
            )
            assert got == Counter({message: MICRO_BATCHES * n for message, n in one.items()})
            # Below the communicator nothing else was sent: no shapes, no second message.
            for way in ("sent", "received"):
                sizes = [n for _, w, _, _, n in schedule["messages"] if w == way]
                assert schedule[way] == {"messages": len(sizes), "bytes": sum(sizes)}


FEW = ("PP4", "TP2 x PP2 x 2 virtual + SP")  # of those that others stand for


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        pytest.param(layout, model, marks=() if (layout, model) in FAST else pytest.mark.slow)
        for layout in LAYOUTS
        for model in MODELS
        if EVERY_CELL
        or MODELS[model].architecture in (PLAIN, *GATED, *STREAMED)
        or (layout in FEW and ("GQA" in model or model not in WITH_HEADS))
    ],
)
def test_messages_are_the_formula_and_megatrons_number(recorded, plain, layout, model):
    layout, model = LAYOUTS[layout], MODELS[model]
    record = recorded(layout, *model.flags)
    check_messages(record, layout, model)
    check_report(record, layout, model)
    reference = plain(layout)
    for rank in range(layout.ranks):
        # The same messages in the same order to the same peers, as many synchronises, and the
        # host never waits for a value more often.
        for mine, theirs in zip(
            record.of(rank, "messages", "synchronises", "host_reads"),
            reference.of(rank, "messages", "synchronises", "host_reads"),
            strict=True,
        ):
            assert [m[:3] for m in mine[0]] == [m[:3] for m in theirs[0]]
            assert mine[1:] == theirs[1:]
    check_collectives(record, reference, layout, model)


@pytest.mark.parametrize(
    ("model", "ratio"), [("transformer", 1), ("satformer", 2), ("satformer, GQA", 1.25)]
)
def test_figures_of_the_design(recorded, model, ratio):
    """docs/design.md, How V1 travels: elements per token at a boundary, 2h and 1.25h."""
    record = recorded(LAYOUTS["PP2"], *MODELS[model].flags)
    ((messages,), *_) = record.of(0, "messages")
    assert {shape[-1] for _, _, _, shape, _ in messages} == {ratio * HIDDEN}


@pytest.mark.parametrize(
    "layout",
    [
        "PP2",
        pytest.param("PP4 x 2 virtual", marks=pytest.mark.slow),
        pytest.param("TP2 x PP2 x 2 virtual + SP", marks=pytest.mark.slow),
    ],
)
def test_bf16_halves_the_bytes(recorded, layout):
    layout = LAYOUTS[layout]
    record = recorded(layout, "--architecture", "satformer", "--bf16")
    check_messages(record, layout, MODELS["satformer"], itemsize=2)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["softmax", "softmax_sigmoid"])
def test_softmax_gates_cost_one_gather_and_one_scatter(recorded, gate):
    """Of [s, b, ng] per mixing layer and micro-batch, and nothing at a boundary."""
    layout = LAYOUTS["TP2 x PP2"]
    record = recorded(layout, "--architecture", "satformer", "--value-gate", gate)
    check_messages(record, layout, MODELS["satformer"])
    relu = recorded(layout, "--architecture", "satformer")
    share = SEQUENCE * BATCH * HEADS // layout.tp
    for rank in range(layout.ranks):
        mixing = 1 if rank < layout.tp else 2
        pairs = zip(record.of(rank, "collectives"), relu.of(rank, "collectives"), strict=True)
        for (mine,), (theirs,) in list(pairs)[:1]:
            assert dict(Counter(mine) - Counter(theirs)) == {
                f"c10d._allgather_base_ over 2 ranks x {share * layout.tp}": mixing * MICRO_BATCHES,
                f"c10d._reduce_scatter_base_ over 2 ranks x {share}": mixing * MICRO_BATCHES,
            }


def check_report(record: Record, layout: Layout, model: Model) -> None:
    """What rank 0 prints at start gives every boundary its width."""
    boundaries = range(layout.pp * layout.virtual - 1)
    widths = [boundary_width(layout, model, b) for b in boundaries]
    size = SEQUENCE * BATCH * max(widths) * 4 // (layout.tp if layout.sp else 1)
    each = ", ".join(f"{width} ({width / HIDDEN:.2f}x)" for width in widths)
    ends = "boundary" if len(widths) == 1 else "boundaries"
    assert (
        f"payload: {each} elements per row at {len(widths)} {ends}, where hidden states alone "
        f"take {HIDDEN}; at most {size / 2**20:.2f} MiB per micro-batch and rank, each way"
    ) in record.output


def lambdas(layout: Layout, model: Model, rank: int, forward_only: bool) -> Counter:
    """ResFormer's, of a step: its lambdas are summed.

    lambda_logits (one per mixing layer) and lambda_scale: one all-reduce over stages. Under tensor
    parallelism those of all chunks and every lambda2: one more over the heads' ranks.
    """
    if forward_only:
        return Counter()
    wanted = Counter({f"c10d.allreduce_ over {layout.pp} ranks x {layout.layers}": 1})
    if layout.tp > 1:
        elements = lambdas_on_rank(layout, rank)
        wanted[f"c10d.allreduce_ over {layout.tp} ranks x {elements}"] += 1
    return wanted


def scalars(layout: Layout, model: Model, rank: int, forward_only: bool) -> Counter:
    """MeanFormer's, of a step: one sum over the heads' ranks, of a beta per layer but the first."""
    layers = layout.layers // layout.pp - (rank // layout.tp == 0)
    if forward_only or layout.tp == 1 or sum(layout.chunks) or layers == 0:
        return Counter()
    return Counter({f"c10d.allreduce_ over {layout.tp} ranks x {layers}": 1})


def routed(layout: Layout, model: Model, rank: int, forward_only: bool) -> Counter:
    """LIMe's: of every layer but the first, and of every micro-batch, one in each direction.

    Keys and values of all KV heads go in, those of the rank's own come out; their gradients return.
    """
    if layout.tp == 1:
        return Counter()
    times = MICRO_BATCHES * len(layers_on_rank(layout, rank) - {1})
    size = SEQUENCE * BATCH * 2 * model.groups * HEAD_DIM
    ranks = f"over {layout.tp} ranks x"
    wanted = Counter({f"c10d._reduce_scatter_base_ {ranks} {size // layout.tp}": times})
    if not forward_only:
        wanted[f"c10d._allgather_base_ {ranks} {size}"] += times
    return +wanted


def three_inputs(layout: Layout, model: Model, rank: int, forward_only: bool) -> Counter:
    """MUDDFormer's, in all layers but the first: what linear_qkv does with an input, twice more.

    Gather it, and again for the gradient of the weight; sum up the gradient of the input.
    """
    times = 2 * MICRO_BATCHES * len(layers_on_rank(layout, rank) - {1})
    whole, among = SEQUENCE * BATCH * HIDDEN, f"over {layout.tp} ranks x"
    if layout.tp == 1 or times == 0:
        return Counter()
    if not layout.sp:
        return Counter() if forward_only else Counter({f"c10d.allreduce_ {among} {whole}": times})
    gathers = Counter({f"c10d._allgather_base_ {among} {whole}": times * (2 - forward_only)})
    sums = Counter({f"c10d._reduce_scatter_base_ {among} {whole // layout.tp}": times})
    return gathers if forward_only else gathers + sums


def tabled(layout: Layout, model: Model, rank: int, forward_only: bool) -> Counter:
    """Value embeddings', of every layer that has a table: what its gates read, 12 numbers a token.

    Gathered or copied, and its gradient summed up; the token ids of every micro-batch go from one
    rank of a stage to the others, once for each chunk but the model's first.
    """
    if layout.tp == 1:
        return Counter()
    among = f"over {layout.tp} ranks x"
    tables = MICRO_BATCHES * len([n for n in layers_on_rank(layout, rank) if n % 2 == 0])
    whole = SEQUENCE * BATCH * 12
    if layout.sp:
        wanted = Counter({f"c10d._allgather_base_ {among} {whole}": tables})
        sums = Counter({f"c10d._reduce_scatter_base_ {among} {whole // layout.tp}": tables})
    else:
        wanted, sums = Counter(), Counter({f"c10d.allreduce_ {among} {whole}": tables})
    if not forward_only:
        wanted += sums
    ids = MICRO_BATCHES * (layout.virtual - (rank < layout.tp))
    return +(wanted + Counter({f"c10d.broadcast_ {among} {SEQUENCE * BATCH}": ids}))


# Of a step, or of an evaluation, beside plain Megatron's.
MORE_COLLECTIVES = {
    "resformer": lambdas,
    "meanformer": scalars,
    "lime": routed,
    "muddformer": three_inputs,
    "value_embeddings": tabled,
}


def check_collectives(record: Record, reference: Record, layout: Layout, model: Model) -> None:
    """As plain Megatron's, in the schedule and in the whole step, but for sums of coefficients.

    Under sequence parallelism those of streams lengthen the one sum of the norms' gradients.
    """
    for rank in range(layout.ranks):
        mine, theirs = record.ranks[rank], reference.ranks[rank]
        for kind in ("schedules", "steps"):
            for own, plain in zip(mine[kind], theirs[kind], strict=True):
                extra = Counter(own["collectives"]) - Counter(plain["collectives"])
                lacking = Counter(plain["collectives"]) - Counter(own["collectives"])
                wanted: Counter = Counter()
                if model.architecture in MORE_COLLECTIVES:
                    count = MORE_COLLECTIVES[model.architecture]
                    wanted = count(layout, model, rank, own.get("forward_only", False))
                for shorter in lacking:  # "operator over n ranks x elements"
                    what, _, elements = shorter.rpartition(" ")
                    assert layout.sp
                    assert model.architecture not in MIXING
                    (longer,) = extra - wanted
                    assert longer == f"{what} {int(elements) + of_streams(layout, model, rank)}"
                    extra -= Counter([longer])
                assert extra == wanted


def layers_on_rank(layout: Layout, rank: int) -> set[int]:
    chunks = range(rank // layout.tp, layout.pp * layout.virtual, layout.pp)
    ends = [0, *layout.layers_before, layout.layers]
    return {n for chunk in chunks for n in range(ends[chunk] + 1, ends[chunk + 1] + 1)}


def of_streams(layout: Layout, model: Model, rank: int) -> int:
    """Numbers in a rank's own tensors that are applied to streams, and not inside attention."""
    config, layers = model.config(layout), layers_on_rank(layout, rank)
    whole = {0} if layout.layers in layers else set()  # the model's own, used by its last layer
    return sum(
        prod(tensor.shape)
        for n in layers | whole
        for tensor in find_architecture(model.architecture).tensors(config, n)
        if "layer_norm" in tensor.megatron or not tensor.megatron.startswith("self_attention.")
    )


def lambdas_on_rank(layout: Layout, rank: int) -> int:
    """Logits and scale of every chunk, lambda2 of every layer but the first of the model."""
    layers = layout.layers // layout.pp - (rank // layout.tp == 0)
    return layout.virtual * layout.layers + layers
