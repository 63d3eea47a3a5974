"""From a shape to a layout: which layers each pipeline stage gets, and what does not divide.

Megatron (0.19.2) asserts most of this in words that name neither option nor value, some of it only
in the middle of the first step. Must not know: modules, process groups, architectures.
"""

import contextlib
from argparse import Namespace
from copy import copy
from functools import cache
from types import SimpleNamespace
from typing import Any

from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_satformer.benchmark.utilization import count_training_flops
from megatron_satformer.expert_layout import check_experts
from megatron_satformer.fitting import flag, near, require_multiple

# Where neither a flag nor the tokenizer says it: the vocabulary of the published sizes.
USUAL_VOCABULARY = 32000
_OWN_STAGES = (
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
)
_VIRTUAL = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
_ACCOUNTED = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")


def choose_stages(args: Namespace) -> dict[str, Any]:
    """Uneven pipeline stages, where the layers are no multiple of the stages and no flag says how.

    Args:
        args: as parsed.

    Returns:
        pipeline_model_parallel_layout, or nothing where none is needed.
    """
    stages = args.pipeline_model_parallel_size
    if (
        not args.num_layers
        or args.num_layers < stages
        or args.num_layers % stages == 0
        or _given(args, *_OWN_STAGES, *_VIRTUAL, *_ACCOUNTED)
    ):
        return {}
    return {"pipeline_model_parallel_layout": format_stages(balance_stages(args, stages))}


def balance_stages(args: Namespace, chunks: int) -> list[int]:
    """Layers of each chunk, so that the slowest has the least to compute, the loss included.

    The embedding looks rows up and computes nothing; the loss is a product with the vocabulary.

    Args:
        args: with the shape; at least as many layers as chunks.
        chunks: pipeline stages, or all virtual ones of all of them.
    """
    loss, layer = _costs(args)

    @cache
    def best(first: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        if first == chunks - 1:
            load = left * layer + loss
            return load, load**2, (left,)
        options = []
        for count in range(1, left - (chunks - 1 - first) + 1):
            worst, squares, rest = best(first + 1, left - count)
            load = count * layer
            options.append((max(load, worst), squares + load**2, (count, *rest)))
        return min(options)

    return list(best(0, args.num_layers)[2])


def _costs(args: Namespace) -> tuple[float, float]:
    """FLOPs per token of the loss and of one layer."""
    heads = args.num_attention_heads or 1
    shape = SimpleNamespace(
        hidden_size=args.hidden_size or 1,
        num_attention_heads=heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else heads,
        ffn_hidden_size=args.ffn_hidden_size or 4 * (args.hidden_size or 1),
        seq_length=args.seq_length or 1,
        vocab_size=_vocabulary(args),
    )
    loss, both = (
        count_training_flops(SimpleNamespace(**vars(shape), num_layers=n)) for n in (0, 1)
    )
    return loss, both - loss


def _vocabulary(args: Namespace) -> int:
    known = args.padded_vocab_size or args.vocab_size
    if not known and args.tokenizer_type:
        # What cannot be read is told where it is needed, after this.
        with contextlib.suppress(Exception):
            known = build_tokenizer(copy(args)).vocab_size
    return known or USUAL_VOCABULARY


def format_stages(layers: list[int]) -> str:
    """Megatron's --pipeline-model-parallel-layout for so many layers in each chunk."""
    chunks = [f"t*{count}" for count in layers]
    return "|".join(["E" + chunks[0], *chunks[1:-1], chunks[-1] + "L"])


def check_layout(args: Namespace) -> None:
    """Refuse shapes and batches that the ranks cannot share.

    Args:
        args: as parsed, with the defaults of a size.

    Raises:
        ValueError: naming option, value, what it must fit, and a value that does.
    """
    if args.use_checkpoint_args or args.encoder_num_layers or args.encoder_seq_length:
        return  # the shape is said elsewhere
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length"):
        _require(args, name, "or take a shape by its name (--model-size)")
    _require(args, "micro_batch_size", "samples of one forward pass on one rank")
    _check_ranks(args)
    _check_shape(args)
    _check_batch(args)
    check_experts(args)
    if args.pipeline_model_parallel_size > 1 or _given(args, *_VIRTUAL):
        _check_stages(args)


def _given(args: Namespace, *names: str) -> list[str]:
    return [name for name in names if getattr(args, name)]


def _require(args: Namespace, name: str, what: str) -> None:
    if not getattr(args, name):
        raise ValueError(
            f"{name} ({getattr(args, name)}) must be a number above 0. Add {flag(name)}, {what}."
        )


def _check_ranks(args: Namespace) -> None:
    names = "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size".split()
    used = [name for name in names if getattr(args, name) > 1]
    total = _model_ranks(args)
    if used and args.world_size % total:
        raise ValueError(
            f"the number of processes ({args.world_size}) must be a multiple of "
            + " times ".join(f"{name} ({getattr(args, name)})" for name in used)
            + f"{f', that is {total}' * (len(used) > 1)}. Start {total}, or a multiple of it, or "
            "use smaller ones."
        )


def _model_ranks(args: Namespace) -> int:
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    return tp * pp * args.context_parallel_size


def _check_shape(args: Namespace) -> None:
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    if args.kv_channels is None:
        require_multiple(args, "hidden_size", "num_attention_heads", "or give --kv-channels")
    if args.group_query_attention:
        require_multiple(args, "num_attention_heads", "num_query_groups")
    for name in ("num_attention_heads", "ffn_hidden_size"):
        if getattr(args, name):
            require_multiple(args, name, "tensor_model_parallel_size")
    if args.sequence_parallel and tp > 1:
        require_multiple(args, "seq_length", "tensor_model_parallel_size")
    if cp > 1 and args.seq_length % (2 * cp):
        raise ValueError(
            f"seq_length ({args.seq_length}) must be a multiple of 2 context_parallel_size "
            f"({cp}). Use {near(args.seq_length, 2 * cp)}."
        )
    longest = args.max_position_embeddings
    if longest is not None and longest < args.seq_length:
        raise ValueError(
            f"max_position_embeddings ({longest}) must be at least seq_length "
            f"({args.seq_length}). Leave it out, or use {args.seq_length}."
        )
    if args.lr is not None and args.min_lr is not None and args.min_lr > args.lr:
        raise ValueError(
            f"min_lr ({args.min_lr}) must be at most lr ({args.lr}). Use a smaller --min-lr."
        )


def _check_batch(args: Namespace) -> None:
    varies = args.rampup_batch_size or args.step_batch_size_schedule
    if varies or args.decrease_batch_size_if_needed or args.tensor_parallel_num_weight_shards:
        return
    replicas = args.world_size // _model_ranks(args)
    chunks = _chunks_per_rank(args)
    for prefix in ("", "eval_"):
        batch = getattr(args, f"{prefix}global_batch_size") or args.global_batch_size
        micro = getattr(args, f"{prefix}micro_batch_size") or args.micro_batch_size
        at_once = micro * replicas
        if batch and batch % at_once:
            fitting = [n for n in range(1, micro) if batch % (n * replicas) == 0]
            option = flag(f"{prefix}micro_batch_size")
            smaller = f" or {option} {fitting[-1]}" if fitting else ""
            raise ValueError(
                f"{prefix}global_batch_size ({batch}) must be a multiple of {prefix}"
                f"micro_batch_size ({micro}) times the data-parallel ranks ({replicas}), that is "
                f"{at_once}. Use {near(batch, at_once)}{smaller}."
            )
        if chunks > 1 and not (prefix and (args.eval_iters == 0 or args.full_validation)):
            _check_interleaving(args, f"{prefix}global_batch_size", batch or at_once, at_once)


def _chunks_per_rank(args: Namespace) -> float:
    stages = args.pipeline_model_parallel_size
    if args.pipeline_model_parallel_layout:
        return (args.pipeline_model_parallel_layout.count("|") + 1) / stages
    each = args.num_layers_per_virtual_pipeline_stage
    return args.num_virtual_stages_per_pipeline_rank or (
        args.num_layers / stages / each if each else 1
    )


def _check_interleaving(args: Namespace, name: str, batch: int, at_once: int) -> None:
    """The interleaved schedule takes micro-batches in groups, no smaller than the pipeline."""
    stages, count = args.pipeline_model_parallel_size, batch // at_once
    group = args.microbatch_group_size_per_vp_stage or stages
    if group < stages:
        raise ValueError(
            f"microbatch_group_size_per_vp_stage ({group}) must be at least "
            f"pipeline_model_parallel_size ({stages}). Leave it out, or use {stages}."
        )
    if count < group or 0 < count % group < stages:
        groups = f"groups of {group}, the last of at least {stages}"
        raise ValueError(
            f"{name} ({batch}) must be a multiple of {group * at_once} with virtual pipeline "
            f"stages: each data-parallel rank has {count} micro-batches, and they go through "
            f"pipeline_model_parallel_size ({stages}) stages in {groups}. Use "
            f"{near(batch, group * at_once)}, or leave virtual stages out."
        )


def _check_stages(args: Namespace) -> None:
    layers, stages = args.num_layers, args.pipeline_model_parallel_size
    if _given(args, *_OWN_STAGES):
        _check_own_stages(args)
        return
    virtual = _given(args, *_VIRTUAL)
    if virtual and stages == 1:
        raise ValueError(
            f"{virtual[0]} ({getattr(args, virtual[0])}) must come with "
            "pipeline_model_parallel_size (1) of at least 2. Leave it out, or use more stages."
        )
    if virtual and stages == 2 and not args.overlap_p2p_comm:
        raise ValueError(
            f"{virtual[0]} ({getattr(args, virtual[0])}) with pipeline_model_parallel_size (2) "
            "must come with overlapped communication: both neighbours of a stage are the same "
            "rank. Leave --no-overlap-p2p-communication out."
        )
    chunks = stages
    if args.num_virtual_stages_per_pipeline_rank:
        chunks *= args.num_virtual_stages_per_pipeline_rank
    per_chunk = args.num_layers_per_virtual_pipeline_stage or 1
    if layers < chunks:
        raise ValueError(
            f"num_layers ({layers}) must be at least one for each of the {chunks} pipeline stages. "
            f"Use {flag('pipeline_model_parallel_size')} {_largest_fitting(args)} or less."
        )
    counted = layers + len(_given(args, *_ACCOUNTED))
    if counted % (chunks * per_chunk) == 0 or not _given(args, *_VIRTUAL, *_ACCOUNTED):
        return
    if args.num_layers_per_virtual_pipeline_stage:
        chunks *= max(1, round(layers / (stages * per_chunk)))
    given = _given(args, *_VIRTUAL, *_ACCOUNTED)
    asked = " with " + " and ".join(f"{name} ({getattr(args, name)})" for name in given)
    instead = " and ".join(map(flag, given))
    raise ValueError(
        f"num_layers ({layers}) must divide evenly over pipeline_model_parallel_size ({stages})"
        f"{asked}. In place of {instead} use --pipeline-model-parallel-layout "
        f"'{format_stages(balance_stages(args, chunks))}'."
    )


def _largest_fitting(args: Namespace) -> int:
    return args.num_layers // (args.num_virtual_stages_per_pipeline_rank or 1)


def _check_own_stages(args: Namespace) -> None:
    layers, stages = args.num_layers, args.pipeline_model_parallel_size
    layout = args.pipeline_model_parallel_layout
    if layout is None:
        first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
        middle = stages - (first is not None) - (last is not None)
        left = layers - (first or 0) - (last or 0)
        if left < middle or (middle and left % middle) or (not middle and left):
            even = format_stages(balance_stages(args, stages)) if layers >= stages else ""
            raise ValueError(
                f"num_layers ({layers}) must leave a multiple of the {middle} other stages beside "
                f"decoder_first_pipeline_num_layers ({first}) and decoder_last_pipeline_num_layers "
                f"({last}); {left} are left. Change them"
                + f", or use --pipeline-model-parallel-layout '{even}'" * bool(even)
                + "."
            )
        return
    try:
        parsed = PipelineParallelLayerLayout(layout, stages)
        parsed.validate_layer_layout(layers, args.mtp_num_layers)
    except (AssertionError, ValueError) as error:
        chunks = max(1, round((layout.count("|") + 1) / stages)) * stages
        raise ValueError(
            f"pipeline_model_parallel_layout ({layout}) must hold num_layers ({layers}) layers (t) "
            f"between one embedding (E) and one loss (L), in a multiple of "
            f"pipeline_model_parallel_size ({stages}) parts (|): {error}. Leave it out, or use one "
            f"like '{format_stages(balance_stages(args, min(chunks, layers)))}'."
        ) from None
