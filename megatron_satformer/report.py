"""The resolved model in ten lines, printed once at start."""

from argparse import Namespace

import torch

from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.parameters import count_moe_layers, count_parameters
from megatron_satformer.parallel.carry import boundary_widths
from megatron_satformer.required import NEVER


def describe_run(args: Namespace, config: DecoderConfig, cuda: bool, vocab_size: int) -> str:
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
        "architecture": config.summary,
        "shape": f"{config.num_layers} layers, hidden {config.hidden_size}, ffn "
        f"{config.ffn_hidden_size}, {config.num_attention_heads} heads of {config.kv_channels}, "
        f"{config.num_query_groups} KV heads, sequence {args.seq_length}, vocabulary {vocab_size}"
        + _experts(config),
        "parameters": _parameters(args, config, vocab_size),
        "batch": f"{args.global_batch_size} sequences, {args.micro_batch_size} per micro-batch, "
        f"{args.global_batch_size * args.seq_length:,} tokens per step",
        "schedule": f"{_length(args)}, lr {args.lr} -> {args.min_lr:g} {args.lr_decay_style}"
        + f"{_warmup(args)}, {_evaluation(args)}",
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "layout": _layout(args),
        "payload": _payload(args, config),
        "backend": f"{config.transformer_impl}, {_device(args, cuda)}",
        "checkpoints": f"save {args.save or 'nowhere'}, load {args.load or 'nothing'}",
    }
    return "\n".join(f"{name:>13}: {text}" for name, text in lines.items())


def _experts(config: DecoderConfig) -> str:
    if config.num_moe_experts is None:
        return ""
    shared = config.moe_shared_expert_intermediate_size
    return (
        f"; {count_moe_layers(config)} layers with {config.num_moe_experts} experts of ffn "
        f"{config.moe_ffn_hidden_size}, {config.moe_router_topk} per token"
        + (f", and a shared one of ffn {shared}" if shared else "")
    )


def _parameters(args: Namespace, config: DecoderConfig, vocab_size: int) -> str:
    learned = args.max_position_embeddings
    count = count_parameters(
        config,
        vocab_size,
        share_embeddings=not args.untie_embeddings_and_output_weights,
        learned_positions=learned if args.position_embedding_type == "learned_absolute" else 0,
    )
    return (
        f"{count.total:,} = {count.embeddings:,} embeddings + {count.layers:,} layers + "
        f"{count.own:,} of {config.architecture} alone"
        * bool(count.own)
        + f"; {count.active:,} used by one token" * bool(count.idle)
    )


def _evaluation(args: Namespace) -> str:
    if not args.eval_iters and not args.full_validation:
        return "not evaluated"
    if args.eval_interval >= NEVER:
        return "evaluated at the end alone"
    return f"evaluated every {args.eval_interval:,} steps"


def _length(args: Namespace) -> str:
    if args.train_samples:
        left = 0 if args.step_batch_size_schedule else args.train_samples % args.global_batch_size
        lost = f" (the last {left:,} less than a step, and not trained on)" if left else ""
        steps = args.train_samples // args.global_batch_size
        asked = f" for {args.train_tokens:,} tokens" if args.train_tokens else ""
        return f"{_samples(args, args.train_samples)}{lost}{asked}, about {steps:,} steps"
    return f"{args.train_iters:,} steps" if args.train_iters else "no training"


def _warmup(args: Namespace) -> str:
    if args.lr_warmup_samples:
        return f", warmup {_samples(args, args.lr_warmup_samples)}"
    return f", warmup {args.lr_warmup_iters:,} steps" if args.lr_warmup_iters else ""


def _samples(args: Namespace, count: int) -> str:
    return f"{count:,} samples ({count * args.seq_length:,} tokens)"


def _layout(args: Namespace) -> str:
    parts = [
        f"TP {args.tensor_model_parallel_size}" + (" + SP" if args.sequence_parallel else ""),
        f"PP {args.pipeline_model_parallel_size}"
        + (f" x {args.virtual_pipeline_model_parallel_size} virtual" * _is_virtual(args))
        + (
            f" as {args.pipeline_model_parallel_layout}"
            if args.pipeline_model_parallel_layout
            else ""
        ),
        f"CP {args.context_parallel_size}",
        f"DP {args.data_parallel_size}"
        + (" (distributed optimizer)" if args.use_distributed_optimizer else ""),
    ]
    if args.expert_model_parallel_size > 1:
        parts.append(f"EP {args.expert_model_parallel_size} within DP")
    return " x ".join(parts) + f" on {args.world_size} ranks"


def _is_virtual(args: Namespace) -> bool:
    return args.virtual_pipeline_model_parallel_size is not None


def _payload(args: Namespace, config: DecoderConfig) -> str:
    if args.pipeline_model_parallel_size == 1:
        return "no stage boundary"
    rows = args.seq_length // args.context_parallel_size * args.micro_batch_size
    if config.sequence_parallel:
        rows //= args.tensor_model_parallel_size
    widths, hidden = boundary_widths(config), config.hidden_size
    sizes = [rows * width * config.pipeline_dtype.itemsize / 2**20 for width in widths]
    ends = "boundary" if len(widths) == 1 else "boundaries"
    each = ", ".join(f"{width} ({width / hidden:.2f}x)" for width in widths)
    return (
        f"{each} elements per row at {len(widths)} {ends}, where hidden states alone take "
        f"{hidden}; at most {max(sizes):.2f} MiB per micro-batch and rank, each way"
    )


def _device(args: Namespace, cuda: bool) -> str:
    if args.dry_run and cuda:
        return f"{args.gpu}, planned for"
    return torch.cuda.get_device_name() if cuda else "cpu (gloo)"
