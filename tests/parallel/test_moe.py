"""Mixture of experts: only the MLP differs, so V1 travels as ever, in every layout."""

import pytest
import torch

from megatron_satformer.checkpoint.convert.to_hf import export_to_hf
from megatron_satformer.checkpoint.megatron.reader import open_checkpoint
from megatron_satformer.model.architectures import PLAIN
from tests.parallel.layouts import CARRYING, GATED, MIXING, OFTEN
from tests.small import DO, PP2, RTOL, SHAPE, SP, TP2

EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 96 --moe-aux-loss-coeff 1e-2 "
    "--moe-shared-expert-intermediate-size 32 --moe-layer-freq ([0]+[1]*3)"
)
# Adam's first step is lr times the sign of a gradient: where that is nearly zero, rounding decides,
# and a near tie in a router may then fall either way. SGD keeps rounding as small as it was.
SGD = "--optimizer sgd --lr 0.3 --min-lr 0.1"
EP2, A2A = "--expert-model-parallel-size 2", "--moe-token-dispatcher-type alltoall"
LAYOUTS = {
    "TP2+SP": (2, f"{TP2} {SP}"),
    "PP2": (2, PP2),
    "PP2 x 2 virtual": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "EP2": (2, EP2),
    "EP2, all-to-all": (2, f"{EP2} {A2A}"),
    "TP2+SP beside EP2": (2, f"{TP2} {SP} {EP2} --expert-tensor-parallel-size 1"),
    "TP2 x PP2 + SP": (4, f"{TP2} {PP2} {SP}"),
    "PP2 x EP2": (4, f"{PP2} {EP2}"),
    "PP2, full recompute": (
        2,
        f"{PP2} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
}
# Megatron's own Transformer beside ours: what it does not keep, nobody can.
CONTROLS = ("TP2+SP", "PP2 x 2 virtual", "EP2")
CASES = [(name, layout) for name in GATED for layout in LAYOUTS]
CASES += [(name, layout) for name in OFTEN if name not in GATED for layout in CONTROLS]
CASES += [(name, CONTROLS[1]) for name in CARRYING if name not in OFTEN]
CASES += [(PLAIN, "EP2")]
FAST = (CASES[3],)
CASES = [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]


@pytest.fixture
def moe(started):
    """Architecture -> flags that continue its checkpoint, that, one rank's next five steps."""

    def start(architecture):
        flags, one = started(architecture, f"{EXPERTS} {SGD}")
        return flags, flags[flags.index("--load") + 1], one

    return start


@pytest.mark.parametrize(("architecture", "layout"), CASES)
def test_layout_equals_one_rank(moe, pretrain, architecture, layout):
    flags, _, one = moe(architecture)
    ranks, extra = LAYOUTS[layout]
    run = pretrain(ranks, *flags, *extra.split())
    assert run.losses == pytest.approx(one.losses, rel=RTOL)
    assert run.grad_norms == pytest.approx(one.grad_norms, rel=RTOL)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP2+SP beside EP2", "PP2 x EP2"])
@pytest.mark.parametrize("architecture", MIXING)
def test_checkpoint_crosses_layouts_exactly(moe, pretrain, tmp_path, architecture, layout):
    """One rank -> layout -> file: a step of size zero, and every saved value as it was."""
    flags, folder, _ = moe(architecture)
    ranks, extra = LAYOUTS[layout]
    still = ["--lr", 0, "--min-lr", 0, "--train-iters", 1, "--save", tmp_path]
    pretrain(ranks, *flags, *still, "--save-interval", 1, *extra.split())
    before, after = open_checkpoint(folder, None), open_checkpoint(tmp_path, None)
    assert set(before.tensors) == set(after.tensors)
    for name in before.tensors:
        assert torch.equal(before.read(name), after.read(name)), name


def test_checkpoint_names_are_transformer_engines(moe):
    """Layer 1 is dense; experts have their norm apart, as Transformer Engine does."""
    _, folder, _ = moe("satformer")
    names = set(open_checkpoint(folder, None).tensors)
    layers = {name.removeprefix("decoder.layers.") for name in names if "layers" in name}
    assert {"0.mlp.linear_fc1.layer_norm_weight", "0.mlp.linear_fc2.weight"} <= layers
    assert {"1.pre_mlp_layernorm.weight", "1.mlp.router.weight"} <= layers
    assert {
        "1.self_attention.value_gate.weight",
        "3.mlp.shared_experts.linear_fc1.weight",
    } <= layers
    assert not any(name.startswith("1.mlp.linear_fc1") for name in layers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "extra"), [(2, f"{EP2} {A2A} {DO}"), (2, f"{PP2} --bf16")], ids=str
)
def test_resume_continues_to_the_last_digit(pretrain, data_flags, tmp_path, ranks, extra):
    flags = [*SHAPE, *data_flags, *EXPERTS.split(), *extra.split(), "--train-iters", 8]
    straight = pretrain(ranks, *flags)
    saving = [*flags, "--save", tmp_path, "--save-interval", 4]
    first = pretrain(ranks, *saving, "--exit-interval", 4)
    second = pretrain(ranks, *saving, "--load", tmp_path)
    assert first.losses + second.losses == straight.losses
    assert first.grad_norms + second.grad_norms == straight.grad_norms


@pytest.mark.slow
def test_optimizer_state_crosses_layouts(pretrain, data_flags, tmp_path):
    flags = [*SHAPE, *data_flags, *EXPERTS.split(), DO, "--dist-ckpt-optim-fully-reshardable"]
    flags += ["--train-iters", 6]
    flags += EP2.split()  # Megatron keeps experts in an optimizer of their own only where EP > 1
    straight = pretrain(2, *flags)
    saving = [*flags, "--save", tmp_path, "--save-interval", 3]
    pretrain(2, *saving, "--exit-interval", 3)
    resumed = pretrain(4, *saving, "--load", tmp_path, *PP2.split())
    assert resumed.losses == pytest.approx(straight.losses[3:], rel=RTOL)
    assert resumed.grad_norms == pytest.approx(straight.grad_norms[3:], rel=RTOL)
    alone = "--expert-model-parallel-size", 1
    refused = pretrain(1, *saving, "--load", tmp_path, *alone, code=2)
    assert "expert_model_parallel_size (1) must be that of the checkpoint in load" in refused.output


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--moe-layer-freq 2 --architecture resformer --value-residual-last-k 2",
        "--moe-router-score-function sigmoid --moe-router-enable-expert-bias",
        "--moe-expert-capacity-factor 1 --moe-router-load-balancing-type seq_aux_loss",
        f"--moe-shared-expert-overlap {A2A} --moe-z-loss-coeff 1e-3",
        "--recompute-granularity selective --recompute-modules moe shared_experts",
        "--value-gate softmax --group-query-attention --num-query-groups 2 --fp16",
    ],
)
def test_megatrons_flags_keep_working(pretrain, data_flags, flags):
    run = pretrain(1, *SHAPE, *data_flags, *EXPERTS.split(), "--train-iters", 3, *flags.split())
    assert len(run.losses) == 3
    assert all(0 < loss < 10 for loss in run.losses)


def test_report_counts_experts(pretrain, data_flags):
    run = pretrain(1, *SHAPE, *data_flags, *EXPERTS.split(), "--train-iters", 1)
    assert "; 3 layers with 4 experts of ffn 96, 2 per token, and a shared one of ffn 32" in (
        run.output
    )
    idle = 3 * 2 * 3 * 64 * 96  # layers, experts not visited, three matrices of h x ffn
    line = next(line for line in run.output.splitlines() if "parameters: " in line)
    total = int(line.split("parameters: ")[1].split(" = ")[0].replace(",", ""))
    assert line.endswith(f"; {total - idle:,} used by one token")


def test_no_export(moe, tmp_path):
    _, folder, _ = moe("satformer")
    with pytest.raises(ValueError, match=r"num_experts \(4\) must be None for an export"):
        export_to_hf(folder, tmp_path / "hf")
