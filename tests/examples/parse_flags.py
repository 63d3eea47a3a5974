"""Parses flags as training would, in a process of its own: parsing sets Megatron's globals."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.arguments import parse_args, validate_args

import tests.architectures  # noqa: F401  # one more in the table
from megatron_satformer import arguments, refusals
from megatron_satformer.layout import check_layout
from megatron_satformer.model.builder import DecoderModelBuilder
from megatron_satformer.model.parameters import count_parameters
from pretrain_satformer import build_model_config

VOCABULARY = 32000
REPORTED = [
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "train_samples",
    "lr_warmup_samples",
    "lr_decay_samples",
    "lr",
    "min_lr",
    "global_batch_size",
    "micro_batch_size",
    "seq_length",
    "kv_channels",
    "adam_beta2",
    "weight_decay",
    "clip_grad",
    "lr_decay_style",
    "init_method_std",
    "normalization",
    "layernorm_epsilon",
    "qk_layernorm",
    "swiglu",
    "add_bias_linear",
    "hidden_dropout",
    "untie_embeddings_and_output_weights",
    "bf16",
    "use_distributed_optimizer",
    "ckpt_format",
]


def describe(flags: list[str], file: str) -> None:
    """Writes what the flags mean, and the parameters of the model, built without memory."""
    sys.argv = ["pretrain_satformer.py", *flags]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}
    preview = arguments.preview_arguments()
    preview.tokenizer_model = __file__  # a test has none
    refusals.check_arguments(preview, cuda=True)
    check_layout(preview)
    defaults = arguments.resolve_defaults(preview, cuda=True)
    args = parse_args(extra_args_provider=partial(arguments.add_arguments, defaults=defaults))
    validate_args(args, {})
    args.padded_vocab_size = VOCABULARY
    model = build_model_config(args)
    counted = count_parameters(model.transformer, VOCABULARY)
    described = {name: getattr(args, name) for name in REPORTED} | {
        "counted": counted.embeddings + counted.layers,
        "counted_own": counted.own,
        "built": count_built(model),
    }
    Path(file).write_text(json.dumps(described))


def count_built(model) -> int:
    """Parameters of the real modules (local ones: Transformer Engine may be missing)."""
    model.transformer.transformer_impl = "local"
    model.transformer.use_cpu_initialization = True  # the path that asks for no CUDA device
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with torch.device("meta"):
        module = DecoderModelBuilder(model).build_model(groups, True, True)
    padding = 0
    for layer in module.decoder.layers:
        fused = layer.self_attention.linear_qkv
        if not hasattr(fused, "weight"):  # three linears, without gates
            continue
        rows, config = fused.weight.shape[0], model.transformer
        gates = config.num_query_groups if rows > 3 * config.hidden_size else 0
        padding += (rows - 3 * config.hidden_size - gates) * config.hidden_size
    return sum(parameter.numel() for parameter in module.parameters()) - padding
