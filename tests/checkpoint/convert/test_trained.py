"""Checkpoints written by pretrain_satformer.py in every layout: Megatron logits equal HF logits."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_satformer.checkpoint.convert.to_hf import export_to_hf
from megatron_satformer.model.architectures import PLAIN, TABLE
from tests.checkpoint.inputs import read_ids
from tests.parallel.layouts import OFTEN

TOLERANCE = 1e-4  # fp32, of a logit
GQA = "--group-query-attention --num-query-groups 2"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
CASES = {
    **{f"{name} tp2": (2, f"--architecture {name} {GQA} {TP2}") for name in TABLE},
    **{f"{name} pp2": (2, f"--architecture {name} {GQA} {PP2}") for name in (PLAIN, *OFTEN)},
    "satformer": (1, GQA),
    "satformer bf16": (1, f"{GQA} --bf16"),
    "satformer pp2 tanh": (2, f"{PP2} --value-gate tanh"),
    "satformer pp2 vpp2": (
        2,
        f"{PP2} --num-layers-per-virtual-pipeline-stage 1 "
        "--value-residual-last-k 2 --value-gate softmax --no-qk-layernorm",
    ),
    "satformer dp2": (
        2,
        "--use-distributed-optimizer --value-gate sigmoid --value-gate-bias --add-qkv-bias "
        "--untie-embeddings-and-output-weights --value-residual-last-k 1",
    ),
    "transformer tp2, no sequence parallelism": (
        2,
        "--architecture transformer --tensor-model-parallel-size 2",
    ),
    "transformer": (1, f"{GQA} --architecture transformer --add-qkv-bias --no-qk-layernorm"),
    "satformer tp2 pp2": (
        4,
        f"{TP2} {PP2} --value-gate softmax_sigmoid",
    ),
    "satformer identity": (1, "--value-gate identity --value-gate-bias"),
}


FAST = ("satformer tp2 pp2", "transformer pp2")
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal(on_ranks, data_flags, tmp_path, name):
    """On text that was not trained on."""
    ranks, flags = CASES[name]
    ids = read_ids(Path(data_flags[data_flags.index("--data-path") + 1]))
    torch.save(ids, tmp_path / "ids")
    saving = [*data_flags, "--save", str(tmp_path / "ckpt"), *flags.split()]
    on_ranks(
        ranks,
        "tests.checkpoint.ranks:train",
        saving,
        str(tmp_path / "ids"),
        str(tmp_path / "logits"),
    )
    made = export_to_hf(tmp_path / "ckpt", tmp_path / "hf")
    dtype = "bf16" if "bf16" in name else "fp32"
    assert (made.step, made.dtype) == (8, dtype)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype="auto", trust_remote_code=True
    ).eval()
    logits = [torch.load(file) for file in sorted(tmp_path.glob("logits.[0-9]"))]
    if "tp2" not in name:
        logits = logits[:1]  # data-parallel ranks have the same
    expected = torch.cat(logits, dim=-1)[..., : model.config.vocab_size]
    with torch.no_grad():
        actual = model(ids).logits.float()
    assert expected.abs().max() > 1, "untrained logits prove little"
    assert expected.argmax(-1).unique().numel() > 3
    difference = (actual - expected).abs().max()
    if dtype == "bf16":
        # both round in every layer: no further apart than twice what rounding alone does
        with torch.no_grad():
            exact = model.float()(ids).logits
        assert difference < 2 * (actual - exact).abs().max(), difference
    else:
        assert difference < TOLERANCE, difference
        assert torch.equal(actual.argmax(-1), expected.argmax(-1))
