"""What a plan counts is what a run on ranks holds, keeps and sends."""

import json

import pytest

from megatron_satformer.model.architectures import TABLE
from tests.small import DO, PP2, SP, TP2

FLAGS = """--model-size debug --mock-data --tokenizer-type NullTokenizer --vocab-size 1023
--train-samples 24 --lr-warmup-samples 1 --eval-iters 0 --num-workers 0 --device cpu""".split()
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
EXPERTS = "--num-experts 4 --moe-router-topk 2 --expert-model-parallel-size 2"
# Ranks and flags; four micro-batches a step.
LAYOUTS = {
    "PP2": (2, PP2),
    "full recompute": (1, FULL),
    "TP2 + SP": (2, f"{TP2} {SP}"),
    "PP2 x 2 virtual": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "PP2, full recompute": (2, f"{PP2} {FULL}"),
    "TP2 x PP2 + SP": (4, f"{TP2} {PP2} {SP}"),
    "DP2, bf16, distributed optimizer": (2, f"{DO} --bf16"),
}
# Every architecture in one layout, so that every layout is there.
CELLS = [(name, [*LAYOUTS][n % len(LAYOUTS)]) for n, name in enumerate(TABLE)]
TOLERANCE, MICRO_BATCHES = 0.15, 4


@pytest.fixture
def compared(zygote, tmp_path):
    """Per rank, what its plan says and what it did."""

    def compare(ranks, pp, *flags):
        argv = [*FLAGS, *flags]
        call = "tests.planning.ranks:predict"
        job = zygote.run(1, call=call, args=[str(tmp_path / "plan"), argv, ranks])
        assert job.codes == [0], job.output[-6000:]
        planned = json.loads((tmp_path / "plan").read_text())
        job = zygote.run(ranks, call="tests.planning.ranks:run", args=[str(tmp_path / "run"), argv])
        assert job.codes == [0] * ranks, job.output[-6000:]
        done = [json.loads((tmp_path / f"run.{rank}").read_text()) for rank in range(ranks)]
        return [(planned[rank // (ranks // pp)], one) for rank, one in enumerate(done)]

    return compare


@pytest.mark.parametrize(
    ("architecture", "layout"),
    [
        ("satformer", "PP2"),
        *(pytest.param(*cell, marks=pytest.mark.slow) for cell in CELLS),
    ],
)
def test_is_what_ranks_hold_and_send(compared, architecture, layout):
    ranks, flags = LAYOUTS[layout]
    pp = 2 if PP2 in flags else 1
    for plan, run in compared(ranks, pp, "--architecture", architecture, *flags.split()):
        check_static(plan, run)
        assert all(ledger == alive for ledger, alive in run["alive"])  # counted in two ways
        assert plan["peak"] == pytest.approx(run["peak"], rel=TOLERANCE)
        # What has just come, or is about to go, counts at that moment.
        in_hand = run["sent"] / MICRO_BATCHES
        assert plan["kept"] == pytest.approx(run["kept"], rel=TOLERANCE, abs=in_hand)
        assert plan["sent"] == run["sent"]
        for message, count in plan["collectives"].items():
            assert run["collectives"][message] - count in (0, 1)  # one is of the whole step
        for message, count in run["collectives"].items():
            point_to_point = message.split()[0] in ("send", "recv_", "broadcast_")
            assert message in plan["collectives"] or point_to_point or count == 1, message


def check_static(plan, run):
    assert plan["parameters"] == run["parameters"]
    for planned, held in zip(plan["static"], run["static"], strict=True):
        assert planned == pytest.approx(held, rel=1e-3)  # buckets are padded


@pytest.mark.slow
def test_parameters_of_experts_are_exact_and_the_rest_is_not_told(compared):
    for plan, run in compared(2, 1, *"--architecture satformer".split(), *EXPERTS.split(), DO):
        check_static(plan, run)
        assert plan["kept"] is plan["peak"] is None


def test_flops_are_the_formulas_and_what_the_architecture_adds(on_ranks):
    on_ranks(1, "tests.planning.ranks:counts_flops")
