"""One line for experts that ranks, groups or layers cannot share."""

import re
import sys
from argparse import Namespace

import pytest

from megatron_satformer import arguments
from megatron_satformer.layout import check_layout

EP, TP, ETP = (
    "expert_model_parallel_size",
    "tensor_model_parallel_size",
    "expert_tensor_parallel_size",
)
GROUPS, CHOSEN = "moe_router_num_groups", "moe_router_group_topk"


@pytest.fixture(scope="module")
def parsed():
    """The real parser's defaults, as `--model-size 130m --num-experts 8` changes them."""
    argv = ["pretrain_satformer.py", "--model-size", "130m", "--num-experts", "8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        return arguments.preview_arguments()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"num_experts": None, EP: 2, "world_size": 2},
            "expert_model_parallel_size (2) must come with num_experts (None).",
        ),
        (
            {"num_experts": None, "moe_ffn_hidden_size": 64},
            "moe_ffn_hidden_size (64) must come with num_experts (None).",
        ),
        ({"num_experts": 0}, "num_experts (0) must be at least 1."),
        (
            {EP: 3, "world_size": 3, "global_batch_size": 24},
            "num_experts (8) must be a multiple of expert_model_parallel_size (3). Use "
            "--expert-model-parallel-size 1, 2, 4, 8.",
        ),
        (
            {EP: 4, "world_size": 2},
            "the number of processes (2) must be a multiple of expert_model_parallel_size (4), "
            "that is 4: so many hold one set of experts. Start 4,",
        ),
        (
            {EP: 2, TP: 2, "world_size": 2},
            "tensor_model_parallel_size (2) times expert_model_parallel_size (2), that is 4",
        ),
        (
            {ETP: 5, "world_size": 5, "global_batch_size": 40},
            "ffn_hidden_size (3072) must be a multiple of expert_tensor_parallel_size (5).",
        ),
        (
            {TP: 2, "world_size": 2, "moe_ffn_hidden_size": 65},
            "moe_ffn_hidden_size (65) must be a multiple of tensor_model_parallel_size (2).",
        ),
        (
            {TP: 2, "world_size": 2, "moe_shared_expert_intermediate_size": 65},
            "moe_shared_expert_intermediate_size (65) must be a multiple of tensor_model_",
        ),
        (
            {ETP: 2, "world_size": 2, "add_bias_linear": True},
            "add_bias_linear (True) must be off with expert_tensor_parallel_size (2)",
        ),
        ({"moe_router_topk": 9}, "moe_router_topk (9) must be from 1 to num_experts (8)."),
        ({"moe_router_topk": 1}, "moe_router_topk (1) must come with --moe-router-pre-softmax"),
        ({GROUPS: 4}, "moe_router_num_groups (4) must come with moe_router_group_topk (None)"),
        ({CHOSEN: 2}, "moe_router_group_topk (2) must come with moe_router_num_groups (None)"),
        ({GROUPS: 3, CHOSEN: 1}, "num_experts (8) must be a multiple of moe_router_num_groups (3)"),
        ({GROUPS: 2, CHOSEN: 3}, "moe_router_group_topk (3) must be at most moe_router_num_groups"),
        (
            {GROUPS: 4, CHOSEN: 1, "moe_router_topk": 3},
            "moe_router_topk (3) must be from 1 to 2: a token's experts are of "
            "moe_router_group_topk (1) groups of 2 experts.",
        ),
        ({"moe_layer_freq": [1, 0]}, "moe_layer_freq ([1, 0]) must be of num_layers (11) numbers"),
    ],
)
def test_what_does_not_divide(parsed, options, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        check_layout(Namespace(**vars(parsed) | options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {EP: 2, "world_size": 2},
        {EP: 2, TP: 2, ETP: 1, "world_size": 2, "global_batch_size": 8},
        {GROUPS: 4, CHOSEN: 2, "moe_router_topk": 3},
        {"moe_router_topk": 1, "moe_router_pre_softmax": True},
        {"moe_layer_freq": [0] + [1] * 10},
    ],
)
def test_what_is_right_passes(parsed, options):
    check_layout(Namespace(**vars(parsed) | options))
