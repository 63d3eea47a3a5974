"""Triton's kernels compute what `mixing` does without them, and compile for a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_satformer.model import kernels
from tests.conftest import ROOT
from tests.model.kernels import CHECKS

triton = pytest.importorskip("triton")

POINTERS = {torch.int64: "*i64", torch.float32: "*fp32", torch.bfloat16: "*bf16"}


@pytest.mark.slow
def test_kernels_equal_plain_torch():
    """Under Triton's interpreter, which reads its switch at import: in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.model.kernels"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n") == [*(f"{check}: equal" for check in CHECKS), ""]


class Recorder:
    """In place of the kernels: what they were launched with, by name."""

    def __init__(self):
        from megatron_satformer.model import triton_kernels

        self.real, self.TYPES, self.launches = triton_kernels, triton_kernels.TYPES, []

    def __getattr__(self, name):
        def launch(*args, num_warps, **sizes):
            self.launches.append((getattr(self.real, name), args, sizes, num_warps))

        class Kernel:
            def __getitem__(self, grid):
                assert all(size > 0 for size in grid)
                return launch

        return Kernel()


@pytest.fixture
def launches(monkeypatch):
    """Every launch of forward and backward passes of the shapes of a layer of 768 in bf16."""
    recorder = Recorder()
    monkeypatch.setattr(kernels, "_kernels", lambda: recorder)
    x = [torch.zeros(64, 768, dtype=torch.bfloat16) for _ in range(12)]
    for m, n in ((1, 12), (4, 12), (4, 5), (5, 4)):
        weights = torch.zeros(64, m, n)
        kernels.mix_forward(weights, x[:n])
        kernels.mix_backward(weights, x[:n], x[:m], [True] * n)
    for k in (6, 48):
        weight = torch.zeros(768, k)
        kernels.products_forward(weight, x[:4])
        kernels.products_backward(weight, x[:4], torch.zeros(64, 4, k), torch.zeros(64, 4, 1))
    for ng in (12, 20):
        heads = [torch.zeros(12, 64 * 64, dtype=torch.bfloat16) for _ in range(4)]
        router = torch.zeros(ng, 2, 12)
        out = kernels.heads_forward(router, heads)
        kernels.heads_backward(router, heads, out, [True] * 4)
    value = torch.zeros(32, 2, 12, 64, dtype=torch.bfloat16)
    for gate in kernels.GATES:
        kernels.blend_forward(value, value[..., 0], value, gate, value)
        kernels.blend_backward(value[..., 0], value, gate, value)
    return recorder.launches


def test_kernels_compile_for_hopper(launches):
    """The compiler refuses what the interpreter takes: a shape that changes in a loop, say."""
    assert {kernel.__name__ for kernel, *_ in launches} == {
        *("mix_forward", "mix_backward", "product_forward", "product_into", "product_own"),
        *("heads_forward", "heads_into", "heads_own", "blend_forward", "blend_backward"),
    }
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    for kernel, args, sizes, warps in launches:
        given = dict(zip(kernel.arg_names, args, strict=False))
        signature = {
            name: "constexpr"
            if name in sizes
            else POINTERS[given[name].dtype]
            if isinstance(given[name], torch.Tensor)
            else "i32"
            for name in kernel.arg_names
        }
        constants = {(kernel.arg_names.index(name),): value for name, value in sizes.items()}
        source = triton.compiler.ASTSource(kernel, signature, constants)
        compiled = triton.compile(source, target=target, options={"num_warps": warps})
        assert compiled.metadata.shared <= 227 * 1024  # bytes that a multiprocessor has
