"""pretrain_satformer.py on the device that is there: bf16, resuming, exporting, more than one."""

import subprocess
import sys

import pytest

from megatron_satformer.arguments import has_transformer_engine
from tests.conftest import ROOT
from tests.gpu.machine import ARCHITECTURES, GPU
from tests.parallel.layouts import OPTIMIZER, PP2, SP, TP2, VIRTUAL

LOCAL = "--transformer-impl local"
LAYOUTS = [f"{TP2} {SP}", PP2, f"{PP2} {VIRTUAL}", OPTIMIZER]
RTOL = 1e-4  # kernels of a GPU add up in an order of their own, and not in the same one each time
BF16_RTOL = 2e-2
pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.skipif(has_transformer_engine(), reason="training on a CPU needs it to be absent")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trains_like_the_cpu(trained, architecture):
    gpu, cpu = trained(architecture, LOCAL), trained(architecture, f"{LOCAL} --device cpu")
    assert gpu.losses == pytest.approx(cpu.losses, rel=RTOL)
    assert gpu.grad_norms == pytest.approx(cpu.grad_norms, rel=10 * RTOL)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_follows_fp32(trained, architecture):
    narrow, full = trained(architecture, f"{LOCAL} --bf16"), trained(architecture, LOCAL)
    assert narrow.losses == pytest.approx(full.losses, rel=BF16_RTOL)
    assert narrow.grad_norms == pytest.approx(full.grad_norms, rel=10 * BF16_RTOL)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_change_nothing(trained, architecture):
    fused, plain = trained(architecture, LOCAL), trained(architecture, f"{LOCAL} --no-fused-blend")
    assert fused.losses == pytest.approx(plain.losses, rel=RTOL)
    assert fused.grad_norms == pytest.approx(plain.grad_norms, rel=10 * RTOL)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resumes_and_exports(started, pretrain, tmp_path, architecture):
    flags, _ = started(architecture)
    flags = [*flags, *LOCAL.split(), "--bf16", "--save-interval", 2]
    whole = pretrain(1, *flags)
    checkpoint = tmp_path / "checkpoint"
    pretrain(1, *flags, "--exit-interval", 2, "--save", checkpoint)
    fresh = "--finetune", "--no-load-optim", "--no-load-rng"
    resumed = [flag for flag in flags if flag not in fresh]
    resumed[resumed.index("--load") + 1] = checkpoint
    rest = pretrain(1, *resumed, "--save", checkpoint)
    assert rest.losses == pytest.approx(whole.losses[2:], rel=RTOL)
    command = [sys.executable, "tools/convert_checkpoint.py", "to-hf"]
    command += ["--load", checkpoint, "--save", tmp_path / "hf", "--verify"]
    done = subprocess.run(map(str, command), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_devices_train_like_one(two_devices, trained, architecture, layout):
    one, two = trained(architecture, LOCAL), trained(architecture, f"{LOCAL} {layout}", ranks=2)
    assert two.losses == pytest.approx(one.losses, rel=RTOL)
    assert two.grad_norms == pytest.approx(one.grad_norms, rel=10 * RTOL)


@pytest.mark.skipif(not has_transformer_engine(), reason="needs Transformer Engine")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_context_parallelism(two_devices, trained, architecture):
    engine = "--transformer-impl transformer_engine --bf16"
    one = trained(architecture, engine)
    two = trained(architecture, f"{engine} --context-parallel-size 2", ranks=2)
    assert two.losses == pytest.approx(one.losses, rel=BF16_RTOL)
