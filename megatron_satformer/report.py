"""The resolved model in ten lines, printed once at start."""

from argparse import Namespace

import torch

from megatron_satformer.config import SATFormerConfig
from megatron_satformer.model.parameters import count_moe_layers, count_parameters
from megatron_satformer.parallel.carry import packed_width


def describe_run(args: Namespace, config: SATFormerConfig, cuda: bool, vocab_size: int) -> str:
    """What is about to be trained, where and how.

    Args:
        args: Megatron's validated arguments.
        config: the model.
        cuda: whether the run uses CUDA.
        vocab_size: padded vocabulary.

    Returns:
        Ten lines.
    """
    lines = {
        "architecture": _architecture(config),
        "shape": f"{config.num_layers} layers, hidden {config.hidden_size}, ffn "
        f"{config.ffn_hidden_size}, {config.num_attention_heads} heads of {config.kv_channels}, "
        f"{config.num_query_groups} KV heads, sequence {args.seq_length}, vocabulary {vocab_size}"
        + _experts(config),
        "parameters": _parameters(args, config, vocab_size),
        "batch": f"{args.global_batch_size} sequences, {args.micro_batch_size} per micro-batch, "
        f"{args.global_batch_size * args.seq_length:,} tokens per step",
        "schedule": f"{_length(args)}, lr {args.lr} -> {args.min_lr} {args.lr_decay_style}",
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "layout": _layout(args),
        "v1 payload": _payload(args, config),
        "backend": f"{config.transformer_impl}, {_device(cuda)}",
        "checkpoints": f"save {args.save or 'nowhere'}, load {args.load or 'nothing'}",
    }
    return "\n".join(f"{name:>13}: {text}" for name, text in lines.items())


def _architecture(config: SATFormerConfig) -> str:
    if config.architecture == "transformer":
        return "transformer"
    text = f"{config.architecture}, {config.num_mixing_layers} of {config.num_layers} layers mix V1"
    if config.architecture == "resformer":
        return text
    bias = " with bias" if config.value_gate_bias else ""
    return f"{text}, {config.value_gate} gate{bias}"


def _experts(config: SATFormerConfig) -> str:
    if config.num_moe_experts is None:
        return ""
    shared = config.moe_shared_expert_intermediate_size
    return (
        f"; {count_moe_layers(config)} layers with {config.num_moe_experts} experts of ffn "
        f"{config.moe_ffn_hidden_size}, {config.moe_router_topk} per token"
        + (f", and a shared one of ffn {shared}" if shared else "")
    )


def _parameters(args: Namespace, config: SATFormerConfig, vocab_size: int) -> str:
    learned = args.max_position_embeddings
    count = count_parameters(
        config,
        vocab_size,
        share_embeddings=not args.untie_embeddings_and_output_weights,
        learned_positions=learned if args.position_embedding_type == "learned_absolute" else 0,
    )
    return (
        f"{count.total:,} = {count.embeddings:,} embeddings + {count.layers:,} layers + "
        f"{count.value_residual:,} value residual"
        + f"; {count.active:,} used by one token"
        * bool(count.idle)
    )


def _length(args: Namespace) -> str:
    if args.train_samples:
        return f"{args.train_samples:,} samples"
    return f"{args.train_iters:,} steps" if args.train_iters else "no training"


def _layout(args: Namespace) -> str:
    parts = [
        f"TP {args.tensor_model_parallel_size}" + (" + SP" if args.sequence_parallel else ""),
        f"PP {args.pipeline_model_parallel_size}"
        + (f" x {args.virtual_pipeline_model_parallel_size} virtual" * _is_virtual(args)),
        f"CP {args.context_parallel_size}",
        f"DP {args.data_parallel_size}"
        + (" (distributed optimizer)" if args.use_distributed_optimizer else ""),
    ]
    if args.expert_model_parallel_size > 1:
        parts.append(f"EP {args.expert_model_parallel_size} within DP")
    return " x ".join(parts) + f" on {args.world_size} ranks"


def _is_virtual(args: Namespace) -> bool:
    return args.virtual_pipeline_model_parallel_size is not None


def _payload(args: Namespace, config: SATFormerConfig) -> str:
    if args.pipeline_model_parallel_size == 1:
        return "no stage boundary"
    rows = args.seq_length // args.context_parallel_size * args.micro_batch_size
    if config.sequence_parallel:
        rows //= args.tensor_model_parallel_size
    width, hidden = packed_width(config), config.hidden_size
    size = rows * width * config.pipeline_dtype.itemsize
    return (
        f"{width} elements per row instead of {hidden} ({width / hidden:.2f}x), "
        f"{size / 2**20:.2f} MiB per boundary, micro-batch and rank, each way"
    )


def _device(cuda: bool) -> str:
    return torch.cuda.get_device_name() if cuda else "cpu (gloo)"
