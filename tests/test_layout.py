"""Uneven stages, and one line for each shape, batch or layout that does not divide."""

import itertools
import re
import sys
from argparse import Namespace

import pytest

from megatron_satformer import arguments
from megatron_satformer.layout import balance_stages, check_layout, choose_stages
from tests.small import RTOL


@pytest.fixture(scope="module")
def parsed():
    """The real parser's defaults, as `--model-size 130m` changes them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain_satformer.py", "--model-size", "130m"])
        return arguments.preview_arguments()


def with_options(parsed, **options):
    return Namespace(**vars(parsed) | {"vocab_size": 32000} | options)


PP, VIRTUAL = "pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank"
LAYOUT, GROUP = "pipeline_model_parallel_layout", "microbatch_group_size_per_vp_stage"


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({PP: 2}, "Et*6|t*5L"),
        ({PP: 3}, "Et*4|t*4|t*3L"),
        ({PP: 4}, "Et*3|t*3|t*3|t*2L"),
        # The loss of this vocabulary computes as much as seven layers.
        ({PP: 2, "vocab_size": 128256}, "Et*9|t*2L"),
        ({PP: 2, "num_layers": 19}, "Et*10|t*9L"),
        ({PP: 2, "num_layers": 24}, None),
        ({PP: 1}, None),
        ({PP: 2, "account_for_loss_in_pipeline_split": True}, None),
        ({PP: 2, "pipeline_model_parallel_layout": "Et*8|t*3L"}, None),
    ],
)
def test_stages_are_chosen(parsed, options, stages):
    chosen = choose_stages(with_options(parsed, **options))
    assert chosen.get("pipeline_model_parallel_layout") == stages


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_no_other_stages_are_faster(parsed, chunks):
    """Against every way to cut, FLOPs of layer and loss written out."""
    args = with_options(parsed, num_layers=11)
    h, ffn = args.hidden_size, args.ffn_hidden_size
    layer = 4 * h * h + 3 * h * ffn + h * args.seq_length
    loss = h * 32000
    slowest = {
        cut: max(*(count * layer for count in cut[:-1]), cut[-1] * layer + loss)
        for cut in itertools.product(range(1, 12), repeat=chunks)
        if sum(cut) == 11
    }
    assert slowest[tuple(balance_stages(args, chunks))] == min(slowest.values())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_layers": None}, "num_layers (None) must be a number above 0. Add --num-layers, or"),
        (
            {"world_size": 6, "tensor_model_parallel_size": 4},
            "the number of processes (6) must be a multiple of tensor_model_parallel_size (4).",
        ),
        (
            {"world_size": 6, "tensor_model_parallel_size": 2, PP: 2},
            "tensor_model_parallel_size (2) times pipeline_model_parallel_size (2), that is 4.",
        ),
        (
            {"tensor_model_parallel_size": 8, "world_size": 8},
            "num_attention_heads (12) must be a multiple of tensor_model_parallel_size (8). Use "
            "--tensor-model-parallel-size 1, 2, 3, 4, 6, 12.",
        ),
        ({"num_attention_heads": 7, "kv_channels": None}, "hidden_size (768) must be a multiple"),
        (
            {"group_query_attention": True, "num_query_groups": 5},
            "num_attention_heads (12) must be a multiple of num_query_groups (5).",
        ),
        (
            {"context_parallel_size": 3, "world_size": 3},
            "seq_length (4096) must be a multiple of 2 context_parallel_size (3). Use 4092 or 4098",
        ),
        (
            {
                "tensor_model_parallel_size": 2,
                "world_size": 2,
                "sequence_parallel": True,
                "seq_length": 4095,
            },
            "seq_length (4095) must be a multiple of tensor_model_parallel_size (2).",
        ),
        ({"max_position_embeddings": 8}, "max_position_embeddings (8) must be at least seq_length"),
        ({"min_lr": 1.0}, "min_lr (1.0) must be at most lr (0.002)."),
        (
            {"world_size": 48},
            "global_batch_size (512) must be a multiple of micro_batch_size (8) times the "
            "data-parallel ranks (48), that is 384. Use 384 or 768.",
        ),
        (
            {"world_size": 128},
            "that is 1024. Use 1024 or --micro-batch-size 4.",
        ),
        (
            {"eval_global_batch_size": 12},
            "eval_global_batch_size (12) must be a multiple of eval_micro_batch_size (8)",
        ),
        ({PP: 16, "world_size": 16}, "num_layers (11) must be at least one for each of the 16"),
        (
            {PP: 2, VIRTUAL: 2, "world_size": 2},
            "with num_virtual_stages_per_pipeline_rank (2). In place of "
            "--num-virtual-stages-per-pipeline-rank use --pipeline-model-parallel-layout "
            "'Et*3|t*3|t*3|t*2L'.",
        ),
        (
            {PP: 2, "num_layers_per_virtual_pipeline_stage": 2, "world_size": 2},
            "use --pipeline-model-parallel-layout 'Et*2|t*2|t*2|t*2|t*2|t*1L'.",
        ),
        (
            {PP: 2, "account_for_loss_in_pipeline_split": True, "num_layers": 12, "world_size": 2},
            "with account_for_loss_in_pipeline_split (True). In place of",
        ),
        ({VIRTUAL: 2}, "must come with pipeline_model_parallel_size (1) of at least 2."),
        (
            {PP: 2, VIRTUAL: 2, "num_layers": 12, "world_size": 2, "overlap_p2p_comm": False},
            "Leave --no-overlap-p2p-communication out.",
        ),
        (
            {PP: 3, "world_size": 3, "decoder_first_pipeline_num_layers": 4},
            "num_layers (11) must leave a multiple of the 2 other stages beside "
            "decoder_first_pipeline_num_layers (4)",
        ),
        (
            {PP: 2, "world_size": 2, "pipeline_model_parallel_layout": "Et*5|t*5L"},
            "pipeline_model_parallel_layout (Et*5|t*5L) must hold num_layers (11) layers",
        ),
        (
            {PP: 2, "world_size": 2, "pipeline_model_parallel_layout": "Ex*5|t*6L"},
            "Leave it out, or use one like 'Et*6|t*5L'.",
        ),
        (
            {PP: 3, "world_size": 3, "pipeline_model_parallel_layout": "Et*5|t*6L"},
            "in a multiple of pipeline_model_parallel_size (3) parts (|)",
        ),
        # At 8 samples at a time on one rank: 64 micro-batches.
        (
            {PP: 2, VIRTUAL: 2, "num_layers": 12, "world_size": 2, "global_batch_size": 24},
            "global_batch_size (24) must be a multiple of 16 with virtual pipeline stages: each "
            "data-parallel rank has 3 micro-batches, and they go through "
            "pipeline_model_parallel_size (2) stages in groups of 2, the last of at least 2. Use "
            "16 or 32, or leave virtual stages out.",
        ),
        (
            {PP: 2, VIRTUAL: 2, "num_layers": 12, "world_size": 2, "eval_global_batch_size": 8},
            "eval_global_batch_size (8) must be a multiple of 16 with virtual pipeline stages",
        ),
        (
            {PP: 2, "world_size": 4, LAYOUT: "Et*3|t*3|t*3|t*2L", "global_batch_size": 16},
            "global_batch_size (16) must be a multiple of 32 with virtual pipeline stages",
        ),
        (
            {PP: 2, VIRTUAL: 2, "num_layers": 12, "world_size": 2, GROUP: 7},
            "stages in groups of 7, the last of at least 2. Use 504 or 560,",
        ),
        (
            {PP: 2, VIRTUAL: 2, "num_layers": 12, "world_size": 2, GROUP: 1},
            "microbatch_group_size_per_vp_stage (1) must be at least pipeline_model_parallel_size",
        ),
    ],
)
def test_what_does_not_divide(parsed, options, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        check_layout(with_options(parsed, **options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"world_size": 8},
        {PP: 2, "world_size": 2},
        {PP: 2, "world_size": 2, "account_for_loss_in_pipeline_split": True},
        {PP: 3, "world_size": 3, "decoder_first_pipeline_num_layers": 3},
        {PP: 2, "world_size": 2, VIRTUAL: 2, "num_layers": 12},
        # 64 micro-batches in groups of 3 leave one, in groups of 31 two.
        {PP: 2, "world_size": 2, VIRTUAL: 2, "num_layers": 12, GROUP: 31},
        {PP: 2, "world_size": 2, "pipeline_model_parallel_layout": "Et*5|t*3|t*3|L"},
        {"use_checkpoint_args": True, "num_layers": None},
    ],
)
def test_what_is_right_passes(parsed, options):
    check_layout(with_options(parsed, **options))


def test_the_stages_are_told_and_train(started, pretrain):
    """Four layers on three stages: the losses and gradients of one rank, from one checkpoint."""
    flags, one = started("satformer")
    split = pretrain(3, *flags, "--pipeline-model-parallel-size", 3)
    assert "PP 3 as Et*1|t*2|t*1L" in split.output
    assert split.losses == pytest.approx(one.losses, rel=RTOL)
    assert split.grad_norms == pytest.approx(one.grad_norms, rel=RTOL)
