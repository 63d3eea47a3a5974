"""Every layout trains like one rank."""

import pytest

from tests.small import DO, PP2, RTOL, SP, TP2

LAYOUTS = {
    "PP2": (2, PP2),
    "PP2, uneven": (2, f"{PP2} --decoder-first-pipeline-num-layers 3"),
    "TP2": (2, TP2),
    "TP2+SP": (2, f"{TP2} {SP}"),
    "PP2 x 2 virtual": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "DP2, distributed optimizer": (2, f"{DO} --overlap-grad-reduce --overlap-param-gather"),
    "TP2 x PP2 + SP": (4, f"{TP2} {PP2} {SP}"),
    "PP2, full recompute": (
        2,
        f"{PP2} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
}


@pytest.mark.parametrize("architecture", ["satformer", "resformer", "transformer"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_rank(started, pretrain, architecture, layout):
    flags, one = started(architecture)
    ranks, extra = LAYOUTS[layout]
    run = pretrain(ranks, *flags, *extra.split())
    assert len(run.losses) == 5
    assert run.losses == pytest.approx(one.losses, rel=RTOL)
    assert run.grad_norms == pytest.approx(one.grad_norms, rel=RTOL)


def test_bf16_follows_fp32(started, pretrain):
    flags, one = started("satformer")
    run = pretrain(2, *flags, *PP2.split(), "--bf16")
    assert run.losses == pytest.approx(one.losses, rel=2e-2)
