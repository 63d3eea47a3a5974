"""Bad input: one clear line from rank 0, exit code 2, before process groups and data."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_satformer import refusals
from tests.small import PP2, SHAPE, TP2

CP, PACKED = "--context-parallel-size 2", "--dataloader-inter-document-masking"
MOE = "--num-experts 4 --moe-router-topk 2"
NO_ENGINE = "needs Transformer Engine, which is not installed. Install it (pip install"
BAD_FLAGS = {
    "--num-query-groups 6": "num_query_groups (6) must come with --group-query-attention",
    "--value-gate cube": "argument --value-gate: invalid choice: 'cube'",
    "--value-residual-last-k 0": "value_residual_last_k (0) must be at least 1 and less than",
    "--value-residual-last-k 4": "value_residual_last_k (4) must be at least 1 and less than",
    "--architecture resformer --value-gate tanh": "value_gate (tanh) must not be given with",
    "--architecture resformer --value-gate-bias": "value_gate_bias (True) must not be given with",
    "--no-such-flag": "unrecognized arguments: --no-such-flag",
    "--fused-single-qkv-rope": "unrecognized arguments: --fused-single-qkv-rope",
    "--spec a b": "spec (a b) must not be given: --architecture (satformer) chooses",
    "--use-mup": "use_mup (True) must come with --scaled-output-init",
    "--yaml-cfg /nowhere.yaml": "yaml_cfg is not supported: Megatron's YAML reader",
    "--device cuda": "device (cuda) must be available",
    "--tokenizer-model /nowhere.model": "tokenizer_model (/nowhere.model) must be an existing file",
    "--data-path /nowhere": "data_path (/nowhere) must be a complete data set",
    "--split 100,0.001,0": "or another --split (weight 0 turns valid off)",
    f"{MOE} {TP2}": "sequence_parallel (False) must be on for num_experts (4) with tensor_model_",
    f"{MOE} --add-bias-linear": "add_bias_linear (True) must be off for num_experts (4)",
    f"{MOE} --add-bias-linear --moe-shared-expert-intermediate-size 32": "shared experts have no",
    f"{CP} --attention-backend local": "context_parallel_size (2) must not come with",
    f"{PACKED} --attention-backend local": "document_masking (True) must not come with",
    f"{CP} --attention-dropout 0.1": "must be 0 with context_parallel_size (2)",
    f"{PACKED} --attention-dropout 0.1": "must be 0 with dataloader_inter_document_masking (True)",
    "--reset-attention-mask --attention-dropout 0.1": "must be 0 with reset_attention_mask (True)",
    "--window-size 8,0 --attention-dropout 0.1": "must be 0 with window_size ((8, 0))",
    "--window-size 8,0 --reset-attention-mask --attention-backend local": "must not come with --re",
    "--window-size 8,8": "window_size ((8, 8)) must be N,0",
    "--context-parallel-size 3": "seq_length (64) must be a multiple of 6, twice context_parallel",
    f"{MOE} {CP}": "context_parallel_size (2) is not supported with num_experts (4)",
    f"{CP} --cp-comm-type a2a": "cp_comm_type (a2a) must be allgather",
    f"{MOE} --moe-token-dispatcher-type flex": "moe_token_dispatcher_type (flex) needs a GPU",
}
# Refused with every architecture, and with those that carry V1.
UNSUPPORTED = {
    "--multi-latent-attention": "multi_latent_attention (True)",
    "--mtp-num-layers 1": "mtp_num_layers (1)",
    "--heterogeneous-layers-config-path /nowhere": "heterogeneous_layers_config_path (/nowhere)",
    "--heterogeneous-layers-config-encoded-json {}": "layers_config_encoded_json ({})",
    "--hybrid-layer-pattern M*M*": "hybrid_layer_pattern (M*M*)",
    "--experimental-attention-variant dsa": "experimental_attention_variant (dsa)",
    "--overlap-moe-expert-parallel-comm": "overlap_moe_expert_parallel_comm (True)",
    "--moe-use-upcycling": "moe_use_upcycling (True)",
    "--transformer-impl inference_optimized": "transformer_impl (inference_optimized)",
    "--freeze-all-layers": "freeze_all_layers (True)",
    "--sft": "sft (True)",
}
NOT_WITH_V1 = {
    "--qk-clip": "qk_clip (True)",
    "--optimizer soap": "optimizer (soap)",
    "--ckpt-format torch": "ckpt_format (torch)",
    "--ckpt-convert-format torch": "ckpt_convert_format (torch)",
    "--cuda-graph-impl local": "cuda_graph_impl (local)",
    "--enable-cuda-graph": "enable_cuda_graph (True)",
    "--external-cuda-graph": "external_cuda_graph (True)",
    "--fine-grained-activation-offloading": "fine_grained_activation_offloading (True)",
    "--cpu-offloading-num-layers 1": "cpu_offloading_num_layers (1)",
    "--tensor-parallel-num-weight-shards 2": "tensor_parallel_num_weight_shards (2)",
    "--fp8-param-gather": "fp8_param_gather (True)",
    "--use-megatron-fsdp": "use_megatron_fsdp (True)",
    "--use-torch-fsdp2": "use_torch_fsdp2 (True)",
}
# What Megatron would drop without a word, or fail at in the middle of a run.
ENGINE_ONLY = {
    "--hierarchical-context-parallel-sizes 2": "hierarchical_context_parallel_sizes ([2])",
    "--transformer-impl transformer_engine": "transformer_impl (transformer_engine)",
    "--fp8-format hybrid": "fp8_format (hybrid)",
    "--fp8-format e4m3": "fp8_format (e4m3)",
    "--fp4-format e2m1": "fp4_format (e2m1)",
    "--recompute-modules layernorm": "recompute_modules (layernorm)",
    "--recompute-modules mlp moe_act": "recompute_modules (mlp moe_act)",
    "--apply-layernorm-1p": "apply_layernorm_1p (True)",
    "--bf16 --fp32-residual-connection": "fp32_residual_connection (True)",
    "--log-max-attention-logit": "log_max_attention_logit (True)",
    "--tp-comm-overlap": "tp_comm_overlap (True)",
    "--delay-wgrad-compute": "delay_wgrad_compute (True)",
    "--use-te-activation-func": "use_te_activation_func (True)",
    f"{MOE} --moe-grouped-gemm": "moe_grouped_gemm (True)",
    f"{MOE} --moe-latent-size 32": "moe_latent_size (32)",
}
SDPA_LACKS = {
    "--softmax-type learnable": "softmax_type (learnable)",
    "--apply-query-key-layer-scaling": "apply_query_key_layer_scaling (True)",
}
REFUSED = (
    BAD_FLAGS
    | {flags: f"{told} is not supported:" for flags, told in UNSUPPORTED.items()}
    | {
        flags: f"{told} is not supported with architecture (satformer): "
        for flags, told in NOT_WITH_V1.items()
    }
    | {flags: f"{told} {NO_ENGINE}" for flags, told in ENGINE_ONLY.items()}
    | {
        flags: f"{told} must come with --attention-backend local"
        for flags, told in SDPA_LACKS.items()
    }
)


@pytest.mark.parametrize("flags", REFUSED)
def test_bad_input_is_one_clear_line(pretrain, data_flags, flags):
    run = pretrain(1, *SHAPE, "--train-iters", 1, *data_flags, *flags.split(), code=2)
    told = [line for line in run.output.splitlines() if "error: " in line]
    assert len(told) == 1, run.output[-3000:]
    assert REFUSED[flags] in told[0]
    assert "Traceback" not in run.output


@pytest.mark.parametrize("flags", ["--multi-latent-attention", "--mtp-num-layers 1"])
def test_the_plain_transformer_is_refused_them_too(pretrain, data_flags, flags):
    flags = [*flags.split(), "--architecture", "transformer"]
    run = pretrain(1, *SHAPE, "--train-iters", 1, *data_flags, *flags, code=2)
    assert "is not supported: " in run.output


@pytest.mark.parametrize("option", ["dataloader_inter_document_masking", "reset_attention_mask"])
def test_packing_and_context_parallelism_at_once_under_transformer_engine(option):
    """Refused together, and only there."""
    options = {
        "context_parallel_size": 2,
        "seq_length": 64,
        "dataloader_inter_document_masking": False,
        "reset_attention_mask": False,
        "attention_backend": "AttnBackend.auto",
        "attention_dropout": 0.0,
        "window_size": None,
        "num_experts": None,
        "cp_comm_type": ["p2p"],
    }
    both = Namespace(**options | {option: True})
    refusals._check_attention(both, "local")
    refusals._check_attention(Namespace(**options), "transformer_engine")
    with pytest.raises(NotImplementedError, match=rf"^{option} \(True\) is not .*size \(2\) by T"):
        refusals._check_attention(both, "transformer_engine")


def test_too_few_groups_for_tensor_parallelism(pretrain, data_flags):
    flags = "--tensor-model-parallel-size 4 --group-query-attention --num-query-groups 2"
    run = pretrain(1, *SHAPE, "--train-iters", 1, *data_flags, *flags.split(), code=2)
    assert (
        "num_query_groups (2) must be a multiple of tensor_model_parallel_size (4): V1 is sharded "
        "by KV head. Use TP 1 or 2." in run.output
    )


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (f"{PP2} --value-gate cube", "invalid choice: 'cube'"),
        (f"{TP2} --group-query-attention --num-query-groups 3", "num_query_groups (3) must be a"),
        ("--mtp-num-layers 1", "mtp_num_layers (1) is not supported"),
    ],
)
def test_only_rank_0_speaks_and_nothing_exists_yet(zygote, data_flags, tmp_path, flags, told):
    flags = [*SHAPE, "--train-iters", 1, *data_flags, *flags.split()]
    flags += ["--data-cache-path", str(tmp_path / "cache"), "--save", str(tmp_path / "save")]
    flags += ["--save-interval", 1]
    call = "tests.test_refusals:leaves_with_nothing_built"
    run = zygote.run(2, call=call, args=[[*map(str, flags)]])
    assert run.codes == [0, 0], run.output[-3000:]
    assert run.output.count(told) == 1
    assert run.output.count("error: ") == 1
    assert [*Path(tmp_path).iterdir()] == []


def leaves_with_nothing_built(argv):
    """On ranks: the whole script leaves with code 2, and no process group has been made."""
    import torch
    from megatron.core import parallel_state

    import pretrain_satformer
    from megatron_satformer import cli

    sys.argv = ["pretrain_satformer.py", *argv]
    with pytest.raises(SystemExit) as leaving:
        pretrain_satformer.main()
    assert leaving.value.code == cli.EXIT_USER_ERROR
    assert not torch.distributed.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
