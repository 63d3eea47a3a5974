"""Dtypes go by their short names; what was trained in is what is exported."""

from argparse import Namespace

import pytest
import torch

from megatron_satformer.checkpoint.dtypes import CODES, DTYPES, choose_dtype, name_dtype


def test_names():
    assert [name_dtype(dtype) for dtype in DTYPES.values()] == ["bf16", "fp16", "fp32"]
    assert name_dtype(torch.int64) == "int64"
    assert set(CODES.values()) == set(DTYPES.values())


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
