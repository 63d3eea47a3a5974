"""Transformer Engine's spec on a GPU: one checkpoint, computed by it and by the local spec."""

import pytest

from megatron_satformer.arguments import has_transformer_engine
from tests.gpu.machine import ARCHITECTURES, GPU

# Its GEMMs multiply fp32 in tf32, 10 bits of mantissa, and bf16 has 7.
TF32_RTOL, BF16_RTOL, FP8_RTOL = 2e-3, 2e-2, 5e-2
ENGINE = "--transformer-impl transformer_engine"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (GPU and has_transformer_engine()),
        reason="needs a GPU and Transformer Engine",
    ),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_twin(measured_on_rank, architecture, dtype):
    measured_on_rank("equals_twin", architecture, "transformer_engine", dtype)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trains_like_the_local_spec(trained, architecture):
    local = trained(architecture, "--transformer-impl local")
    engine = trained(architecture, ENGINE)
    assert engine.losses == pytest.approx(local.losses, rel=TF32_RTOL)
    assert engine.grad_norms == pytest.approx(local.grad_norms, rel=10 * TF32_RTOL)


@pytest.mark.parametrize("backend", ["fused", "flash"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_with_its_attention(trained, architecture, backend):
    if backend == "flash":
        pytest.importorskip("flash_attn")
    local = trained(architecture, "--transformer-impl local")
    engine = trained(architecture, f"{ENGINE} --bf16 --attention-backend {backend}")
    assert engine.losses == pytest.approx(local.losses, rel=BF16_RTOL)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fp8(trained, architecture):
    local = trained(architecture, "--transformer-impl local")
    engine = trained(architecture, f"{ENGINE} --bf16 --fp8-format hybrid")
    assert engine.losses == pytest.approx(local.losses, rel=FP8_RTOL)
