"""Every layout trains like one rank: five losses and gradient norms from one checkpoint."""

import pytest

from tests.parallel.layouts import EVERY_CELL, GATED, OPTIMIZER, OURS, PP2, ROWS, SP, TP2, Row
from tests.small import RTOL

BF16_RTOL = 2e-2  # gradients are accumulated in fp32
BF16 = [
    (2, PP2),
    pytest.param(2, f"{TP2} {SP}", marks=pytest.mark.slow),
    pytest.param(8, f"{TP2} {PP2} {OPTIMIZER}", marks=pytest.mark.slow),
]


def largest_difference(values, wanted):
    assert len(values) == len(wanted) == 5
    return max(abs(a / b - 1) for a, b in zip(values, wanted, strict=True))


def runs_everywhere(row, architecture):
    """Whether a cell runs elsewhere than in `make parity`, whose --matrix-table has them all.

    Few of what carries nothing, and few of 8 ranks, which two cores run for long.
    """
    if architecture in row.fast:
        return True
    return (
        architecture in OURS
        and architecture in row.few
        and (row.ranks < 8 or architecture in GATED)
    )


def pytest_generate_tests(metafunc):
    if "row" not in metafunc.fixturenames:
        return
    whole = EVERY_CELL or metafunc.config.getoption("--matrix-table") is not None
    cells = [
        pytest.param(
            row,
            architecture,
            marks=[] if architecture in row.fast else [pytest.mark.slow],
            id=f"{row.name}-{architecture}",
        )
        for row in ROWS
        for architecture in row.architectures
        if whole or runs_everywhere(row, architecture)
    ]
    metafunc.parametrize(("row", "architecture"), cells)


def test_layout_equals_one_rank(started, pretrain, record_property, row: Row, architecture):
    flags, one = started(architecture, row.model)
    run = pretrain(row.ranks, *flags, *row.layout.split())
    losses = largest_difference(run.losses, one.losses)
    norms = largest_difference(run.grad_norms, one.grad_norms)
    record_property("cell", (row.name, architecture, losses, norms))
    assert max(losses, norms) <= RTOL


@pytest.mark.parametrize(("ranks", "layout"), BF16, ids=str)
def test_bf16_follows_fp32(started, pretrain, ranks, layout):
    flags, one = started("satformer")
    run = pretrain(ranks, *flags, *layout.split(), "--bf16")
    assert run.losses == pytest.approx(one.losses, rel=BF16_RTOL)
    assert run.grad_norms == pytest.approx(one.grad_norms, rel=BF16_RTOL)
