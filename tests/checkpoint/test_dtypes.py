"""Dtypes go by their short names; what was trained in is what is exported."""

from argparse import Namespace

import pytest
import torch

from megatron_satformer.checkpoint.dtypes import CODE_OF, CODES, DTYPES, NAMES, choose_dtype


def test_names():
    assert (DTYPES["bf16"], CODES["BF16"]) == (torch.bfloat16, torch.bfloat16)
    assert [CODE_OF[dtype] for dtype in DTYPES.values()] == ["BF16", "F16", "F32"]
    assert {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"} == NAMES


@pytest.mark.parametrize(
    ("bf16", "fp16", "given", "chosen"),
    [
        (True, False, None, "bf16"),
        (False, True, None, "fp16"),
        (False, False, None, "fp32"),
        (True, False, "fp32", "fp32"),
    ],
)
def test_chosen(bf16, fp16, given, chosen):
    assert choose_dtype(Namespace(bf16=bf16, fp16=fp16), given) == chosen


def test_another_is_refused():
    with pytest.raises(ValueError, match=r"dtype \(fp8\) must be one of bf16, fp16, fp32\."):
        choose_dtype(Namespace(bf16=False, fp16=False), "fp8")
