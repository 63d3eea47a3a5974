"""Muon in layouts, across a resume, and on what its matrices are."""

import pytest
import torch
from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon

from megatron_satformer.backend import muon
from megatron_satformer.model.architectures import TABLE
from tests.parallel.layouts import GATED, PP2, SP, TP2
from tests.parallel.test_matrix import largest_difference
from tests.small import RTOL, SHAPE

# Blockwise, Megatron's default, orthogonalises what each rank holds: other layouts, other steps.
# Medium, its default too, multiplies in bf16, whose noise orthogonalising does not damp.
MUON = "--optimizer muon --muon-tp-mode duplicated --muon-fp32-matmul-prec high"
LAYOUTS = {
    "TP2 x PP2": (4, f"{TP2} {PP2}"),
    "TP2 + SP": (2, f"{TP2} {SP}"),
    "PP2": (2, PP2),
    "DP2": (2, ""),
}
CELLS = [
    (architecture, layout)
    for architecture in TABLE
    for layout in (LAYOUTS if architecture in GATED else ["TP2 x PP2"])
]
LAYER_WISE = "--use-distributed-optimizer"
BF16_RTOL = 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "layout"), CELLS)
def test_layout_equals_one_rank(started, pretrain, architecture, layout):
    ranks, more = LAYOUTS[layout]
    flags, one = started(architecture, MUON)
    run = pretrain(ranks, *flags, *more.split())
    assert largest_difference(run.losses, one.losses) <= RTOL
    assert largest_difference(run.grad_norms, one.grad_norms) <= RTOL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "then", "layout", "rtol"),
    [
        (2, 2, "", 0),
        (2, 2, LAYER_WISE, 0),
        (2, 1, LAYER_WISE, BF16_RTOL),
        (2, 2, TP2, BF16_RTOL),
        (2, 2, PP2, BF16_RTOL),
    ],
)
def test_resumes(pretrain, data_flags, tmp_path, ranks, then, layout, rtol):
    """Layer-wise, each matrix is one rank's; what is saved knows neither that nor the layout."""
    flags = [*SHAPE, *data_flags, *MUON.split(), "--bf16", "--train-iters", 4, "--save-interval", 2]
    before = layout if layout == LAYER_WISE else ""
    whole = pretrain(ranks, *flags, *before.split(), "--save", tmp_path)
    rest = [*flags, "--load", tmp_path, "--ckpt-step", 2, *layout.split()]
    resumed = pretrain(then, *rest)
    assert resumed.losses == pytest.approx(whole.losses[2:], rel=rtol, abs=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optimizer muon --use-distributed-optimizer", "must come with bf16"),
        ("--optimizer dist_muon", "must come with bf16"),
        ("--optimizer soap", "optimizer (soap) is not supported"),
    ],
)
def test_what_does_not_work_is_refused(pretrain, data_flags, flags, message):
    run = pretrain(1, *SHAPE, *data_flags, "--train-iters", 1, *flags.split(), code=2)
    assert message in run.output


def test_pieces_are_matrices_of_their_own_and_padding_stays_zero():
    """Against Megatron's Muon on a linear_qkv without gate rows, and on the gate rows alone."""
    torch.manual_seed(0)
    fused = torch.nn.Parameter(torch.randn(2 * 24 + 2 + 14, 32))
    fused.data[-14:] = 0
    fused.qkv_split_shapes = (48, 2, 14), (8, 8, 8)
    qkv = torch.nn.Parameter(fused.data[:48].clone())
    qkv.is_qkv, qkv.qkv_split_shapes = True, [8, 8, 8]
    gate = torch.nn.Parameter(fused.data[48:50].clone())
    gradient = torch.randn_like(fused)
    gradient[-14:] = 0
    for parameter, part in ((fused, slice(0, 64)), (qkv, slice(0, 48)), (gate, slice(48, 50))):
        parameter.grad = gradient[part].clone()
    options = {"lr": 0.1, "split_qkv": True, "is_qkv_fn": lambda p: getattr(p, "is_qkv", False)}
    muon._Muon([fused], **options).step()
    TensorParallelMuon([qkv, gate], **options).step()
    assert torch.equal(fused[:48], qkv)
    assert torch.equal(fused[48:50], gate)
    assert fused[50:].abs().max() == 0
