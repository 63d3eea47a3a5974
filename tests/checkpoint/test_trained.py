"""Checkpoints written by pretrain_satformer.py in every layout: Megatron logits equal HF logits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_satformer.checkpoint.hf.modeling_satformer import SATFormerForCausalLM
from megatron_satformer.checkpoint.to_hf import export_to_hf

RUNS = Path(__file__).with_name("megatron_runs.py")
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}
GQA = "--group-query-attention --num-query-groups 2"
CASES = {
    "satformer": (1, GQA),
    "satformer bf16": (1, f"{GQA} --bf16"),
    "satformer tp2": (2, f"{GQA} --tensor-model-parallel-size 2 --sequence-parallel"),
    "satformer pp2": (2, "--pipeline-model-parallel-size 2 --value-gate tanh"),
    "satformer pp2 vpp2": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--value-residual-last-k 2 --value-gate softmax --no-qk-layernorm",
    ),
    "satformer dp2": (
        2,
        "--use-distributed-optimizer --value-gate sigmoid --value-gate-bias --add-qkv-bias "
        "--untie-embeddings-and-output-weights --value-residual-last-k 1",
    ),
    "resformer pp2": (2, f"{GQA} --architecture resformer --pipeline-model-parallel-size 2"),
    "transformer tp2": (2, "--architecture transformer --tensor-model-parallel-size 2"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Trains all cases, one after the other, in children of one process."""
    root = tmp_path_factory.mktemp("trained")
    cases = [
        {
            "ranks": ranks,
            "flags": [
                *["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"],
                *["--save", str(root / name / "ckpt"), *flags.split()],
            ],
            "logits": str(root / name / "logits"),
        }
        for name, (ranks, flags) in CASES.items()
    ]
    for name in CASES:
        (root / name).mkdir()
    (root / "cases.json").write_text(json.dumps(cases))
    run = subprocess.run(
        [sys.executable, RUNS, root / "cases.json"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_equal(name, trained):
    folder = trained / name
    made = export_to_hf(folder / "ckpt", folder / "hf")
    dtype = "bf16" if "bf16" in name else "fp32"
    assert (made.step, made.dtype) == (6, dtype)
    logits = [torch.load(file) for file in sorted(folder.glob("logits.[0-9]"))]
    if "tp2" not in name:
        logits = logits[:1]  # data-parallel ranks have the same
    expected = torch.cat(logits, dim=-1)[..., :100]
    model = SATFormerForCausalLM.from_pretrained(folder / "hf", dtype="auto").eval()
    sys.path.insert(0, str(RUNS.parent))
    try:
        from megatron_runs import build_ids
    finally:
        sys.path.pop(0)
    with torch.no_grad():
        actual = model(build_ids()).logits.float()
    assert expected.abs().max() > 1, "untrained logits prove little"
    difference = (actual - expected).abs().max()
    assert difference < TOLERANCE[dtype], difference
    if dtype == "fp32":
        assert torch.equal(actual.argmax(-1), expected.argmax(-1))
