"""Bad input: one clear line from rank 0, exit code 2, before process groups and data."""

import pytest

from tests.small import PP2, SHAPE

BAD_FLAGS = {
    "--num-query-groups 6": "num_query_groups (6) must come with --group-query-attention",
    "--value-gate cube": "argument --value-gate: invalid choice: 'cube'",
    "--value-residual-last-k 4": "value_residual_last_k (4) must be at least 1 and less than",
    "--architecture resformer --value-gate tanh": "value_gate (tanh) must not be given with",
    "--context-parallel-size 2": "context_parallel_size (2) needs Transformer Engine",
    "--transformer-impl transformer_engine": "Install it (pip install",
    "--fp8-format hybrid": "fp8_format (hybrid) needs Transformer Engine",
    "--no-such-flag": "unrecognized arguments: --no-such-flag",
    "--spec a b": "spec (a b) must not be given: --architecture (satformer) chooses",
    "--multi-latent-attention": "multi_latent_attention (True) is not supported",
    "--num-experts 4": "num_experts (4) is not supported",
    "--device cuda": "device (cuda) must be available",
    "--tokenizer-model /nowhere.model": "tokenizer_model (/nowhere.model) must be an existing file",
    "--data-path /nowhere": "data_path (/nowhere) must be a complete data set",
    "--split 100,0.001,0": "or another --split (weight 0 turns valid off)",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_input_is_one_clear_line(pretrain, data_flags, flags):
    run = pretrain(1, *SHAPE, "--train-iters", 1, *data_flags, *flags.split(), code=2)
    told = [line for line in run.output.splitlines() if "error: " in line]
    assert len(told) == 1, run.output[-3000:]
    assert BAD_FLAGS[flags] in told[0]
    assert "Traceback" not in run.output


def test_too_few_groups_for_tensor_parallelism(pretrain, data_flags):
    flags = "--tensor-model-parallel-size 4 --group-query-attention --num-query-groups 2"
    run = pretrain(1, *SHAPE, "--train-iters", 1, *data_flags, *flags.split(), code=2)
    assert (
        "num_query_groups (2) must be a multiple of tensor_model_parallel_size (4): V1 is sharded "
        "by KV head. Use TP 1 or 2." in run.output
    )


def test_only_rank_0_speaks(pretrain, data_flags):
    flags = [*SHAPE, "--train-iters", 1, *data_flags, *PP2.split(), "--value-gate", "cube"]
    run = pretrain(2, *flags, code=2)
    assert run.output.count("invalid choice") == 1
