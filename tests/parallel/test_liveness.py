"""What is carried lives from its micro-batch's forward to its backward, not a moment longer.

See liveness.py for how storages are watched.
"""

import json
from dataclasses import dataclass

import pytest

from megatron_satformer.model.architectures import PLAIN
from tests.parallel.layouts import CARRYING, EVERY_CELL, GATED, MIXING, STREAMED
from tests.small import PP2, SHAPE

MICRO_BATCHES = 4  # as SHAPE has them
MOCK = "--mock-data --tokenizer-type NullTokenizer --vocab-size 127".split()
VIRTUAL = f"{PP2} --num-layers-per-virtual-pipeline-stage 1"
FULL = "--recompute-granularity full --recompute-num-layers 1 --recompute-method"
WARM_STEPS, STEPS, FEWER_STEPS, SEQUENCE = 5, 50, 20, 256
SCATTER = 4 * 1024**2


@dataclass(frozen=True)
class Layout:
    flags: str
    pp: int = 1
    virtual: int = 1
    model: str = ""
    keeps: int = 1  # V1 kept for each of the model's first chunk in flight; others read what came

    def most_in_flight(self, rank: int) -> int:
        """Chunks whose forward has run and whose backward has not, at most: 1F1B."""
        if self.virtual == 1:
            return min(self.pp - rank, MICRO_BATCHES)
        warm_up = 2 * (self.pp - rank - 1) + (self.virtual - 1) * self.pp
        return min(warm_up + 1, self.virtual * MICRO_BATCHES)


FEW = ("PP4", "PP2 x 2 virtual, uniform recompute")  # of those that others stand for
LAYOUTS = {
    "one rank": Layout(""),
    "one rank, uniform recompute": Layout(f"{FULL} uniform"),
    "one rank, block recompute": Layout(f"{FULL} block"),
    "PP2": Layout(PP2, pp=2),
    "PP2, uniform recompute": Layout(f"{PP2} {FULL} uniform", pp=2),
    "PP2 x 2 virtual": Layout(VIRTUAL, pp=2, virtual=2),
    # One layer per chunk, and its recomputation starts from what the chunk got.
    "PP2 x 2 virtual, uniform recompute": Layout(
        f"{VIRTUAL} {FULL} uniform", pp=2, virtual=2, keeps=0
    ),
    "PP4": Layout("--pipeline-model-parallel-size 4", pp=4),
    "PP4, the last layer mixes": Layout(
        "--pipeline-model-parallel-size 4",
        pp=4,
        model="--value-residual-last-k 1",
    ),
}
CASES = [
    (name, architecture)
    for name, layout in LAYOUTS.items()
    for architecture in (MIXING if layout.model else CARRYING)
    if EVERY_CELL or architecture in (*GATED, *STREAMED) or layout.model or name in FEW
]
FAST = [(layout, name) for layout in ("PP2", "PP2 x 2 virtual") for name in GATED]


@pytest.fixture(scope="module")
def lives(zygote, tmp_path_factory):
    """Rank -> schedules (two steps, two evaluations) -> events of liveness.Watch."""
    made = {}

    def run(layout: Layout, architecture: str) -> list[list[dict]]:
        if (layout, architecture) not in made:
            path = tmp_path_factory.mktemp("lives") / "record"
            argv = [*SHAPE, *MOCK, "--train-iters", "2", *layout.flags.split()]
            argv += ["--architecture", architecture]
            if architecture in MIXING:
                argv += layout.model.split()
            call = "tests.parallel.liveness:lives"
            job = zygote.run(layout.pp, call=call, args=[str(path), argv])
            assert job.codes == [0] * layout.pp, job.output[-6000:]
            files = [path.with_suffix(f".{rank}") for rank in range(layout.pp)]
            made[layout, architecture] = [json.loads(file.read_text()) for file in files]
        return made[layout, architecture]

    return run


@pytest.mark.parametrize(
    ("layout", "architecture"),
    [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow, id=" - ".join(case))
        for case in CASES
    ],
)
def test_what_is_carried_lives_as_long_as_its_micro_batch(lives, layout, architecture):
    # That all of it is dead after its own backward, and after a step, is asserted on the ranks.
    layout = LAYOUTS[layout]
    mine, plain = lives(layout, architecture), lives(layout, PLAIN)
    for rank in range(layout.pp):
        for schedule, theirs in zip(mine[rank], plain[rank], strict=True):
            events = schedule["events"]
            most = 0 if schedule["forward_only"] else layout.most_in_flight(rank)
            assert max(in_flight for _, in_flight, *_ in events) == most
            if architecture in MIXING:
                for _, _, starting, made, _, _ in events:
                    assert made == starting * layout.keeps
            # What carries it between stages lives no longer than the plain Transformer's hidden
            # states: outputs are freed once sent (deallocate_pipeline_outputs).
            assert schedule["forward_only"] == theirs["forward_only"]
            for own, reference in zip(events, theirs["events"], strict=True):
                assert own[:3] == reference[:3]
                assert all(a <= b for a, b in zip(own[4:], reference[4:], strict=True))


@pytest.mark.parametrize(
    "architecture",
    [name if name in GATED else pytest.param(name, marks=pytest.mark.slow) for name in CARRYING],
)
@pytest.mark.parametrize(
    ("layer", "part"),
    [
        pytest.param(1, "self_attention.core_attention", marks=pytest.mark.slow),
        (3, "self_attention.k_layernorm"),  # between linear_qkv, gate rows included, and the blend
        (3, "self_attention.core_attention"),
        pytest.param(4, "mlp", marks=pytest.mark.slow),
    ],
)
def test_exception_leaves_nothing_on_one_rank(on_ranks, architecture, layer, part):
    argv = [*SHAPE, *MOCK, "--train-iters", "3", "--architecture", architecture]
    on_ranks(1, "tests.parallel.liveness:dies", argv, 0, layer, part)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [PP2, VIRTUAL])
def test_exception_leaves_nothing_on_two_ranks(on_ranks, layout):
    argv = [*SHAPE, *MOCK, "--train-iters", "3", *layout.split()]
    on_ranks(2, "tests.parallel.liveness:dies", argv, 1, 4, "self_attention.core_attention")


@pytest.fixture(scope="module")
def bytes_by_step(zygote, tmp_path_factory):
    """(architecture, rank) -> after every step: bytes of live tensors, bytes of the process."""
    folder = tmp_path_factory.mktemp("memory")
    made = {}
    for architecture in (PLAIN, *CARRYING):
        count = STEPS if architecture in (PLAIN, *GATED) else FEWER_STEPS
        argv = [*SHAPE, *MOCK, *VIRTUAL.split(), "--train-iters", str(count)]
        argv += ["--seq-length", str(SEQUENCE), "--max-position-embeddings", str(SEQUENCE)]
        argv += ["--eval-iters", "0", "--architecture", architecture]
        call = "tests.parallel.liveness:memory"
        job = zygote.run(2, call=call, args=[str(folder / architecture), argv])
        assert job.codes == [0, 0], job.output[-6000:]
        for rank in range(2):
            steps = json.loads((folder / f"{architecture}.{rank}").read_text())
            assert len(steps) == count
            made[architecture, rank] = steps
    return made


@pytest.mark.slow
def test_live_tensors_are_the_same_bytes_after_every_step(bytes_by_step):
    for steps in bytes_by_step.values():
        alive = {tensors for tensors, _ in steps[WARM_STEPS - 1 :]}
        assert len(alive) == 1
        assert min(alive) > 0


@pytest.mark.slow
def test_process_grows_no_more_than_with_a_plain_transformer(bytes_by_step):
    one_v1 = SEQUENCE * 2 * 64 * 4  # s b kv, fp32
    for (architecture, rank), steps in bytes_by_step.items():
        count = len(steps) - WARM_STEPS
        plain = bytes_by_step[PLAIN, rank]
        grown, theirs = (
            run[WARM_STEPS - 1 + count][1] - run[WARM_STEPS - 1][1] for run in (steps, plain)
        )
        # One V1 per step, one per micro-batch being four times it; or what the process scatters by.
        assert grown - theirs < max(count * one_v1, SCATTER), (architecture, rank)
