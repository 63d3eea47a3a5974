"""Checkpoints written by pretrain_satformer.py in every layout: Megatron logits equal HF logits."""

import pytest
import torch

from megatron_satformer.checkpoint.hf.modeling_satformer import SATFormerForCausalLM
from megatron_satformer.checkpoint.to_hf import export_to_hf
from tests.checkpoint.inputs import VOCABULARY, build_ids

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


@pytest.mark.parametrize("name", CASES)
def test_logits_equal(on_ranks, tmp_path, name):
    ranks, flags = CASES[name]
    saving = ["--save", str(tmp_path / "ckpt"), *flags.split()]
    on_ranks(ranks, "tests.checkpoint.ranks:train", saving, str(tmp_path / "logits"))
    made = export_to_hf(tmp_path / "ckpt", tmp_path / "hf")
    dtype = "bf16" if "bf16" in name else "fp32"
    assert (made.step, made.dtype) == (6, dtype)
    logits = [torch.load(file) for file in sorted(tmp_path.glob("logits.[0-9]"))]
    if "tp2" not in name:
        logits = logits[:1]  # data-parallel ranks have the same
    expected = torch.cat(logits, dim=-1)[..., :VOCABULARY]
    model = SATFormerForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    with torch.no_grad():
        actual = model(build_ids()).logits.float()
    assert expected.abs().max() > 1, "untrained logits prove little"
    difference = (actual - expected).abs().max()
    assert difference < TOLERANCE[dtype], difference
    if dtype == "fp32":
        assert torch.equal(actual.argmax(-1), expected.argmax(-1))
