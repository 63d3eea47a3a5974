"""The plan of one layout: every pipeline rank's numbers, bytes and FLOPs, and how long it takes.

Must not know: how arguments are parsed.
"""

from argparse import Namespace
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from types import SimpleNamespace

import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from megatron_satformer.benchmark.utilization import count_training_flops
from megatron_satformer.model.architectures import PLAIN, find_architecture
from megatron_satformer.model.builder import DecoderModelConfig
from megatron_satformer.parallel.carry import chunk_layers
from megatron_satformer.planning.fake_ranks import Silu, build_chunk, fake_rank
from megatron_satformer.planning.hardware import GB, GPU, find_gpu
from megatron_satformer.planning.measure import Footprint, count_parameters, measure
from megatron_satformer.planning.memory import Static, count_static
from megatron_satformer.planning.schedule import Held, most_held, passes
from megatron_satformer.planning.speed import Layout, Speed, estimate

UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True)
class Stage:
    """One pipeline rank.

    Attributes:
        layers: numbers of those of each of its chunks.
        chunks: what one micro-batch does in each.
        static: bytes held all the time.
        held: bytes of activations; None where they were not counted.
    """

    layers: list[range]
    chunks: list[Footprint]
    static: Static
    held: Held | None

    @property
    def bytes(self) -> int:
        """All that it needs at once."""
        return sum(self.static) + (self.held.bytes if self.held else 0)

    @property
    def parameters(self) -> int:
        """Numbers that it holds."""
        return sum(chunk.parameters + chunk.expert_parameters for chunk in self.chunks)


@dataclass(frozen=True)
class Plan:
    """What a run needs and takes.

    Attributes:
        stages: one per pipeline rank.
        micro_batches: of a step.
        flops: per token, of the whole model, forward and backward.
        plain_flops: what a plain Transformer of the shape has of it.
        gpu: which it was made for.
        memory: bytes that each may be filled to.
        utilization: assumed, and where from.
        speed: estimated; None where activations were not counted.
        steps: of the whole run.
        notes: what is counted otherwise than the run will compute it.
    """

    stages: list[Stage]
    micro_batches: int
    flops: float
    plain_flops: float
    gpu: GPU
    memory: int
    utilization: tuple[float, str]
    speed: Speed | None
    steps: int
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every rank has the memory."""
        return max(stage.bytes for stage in self.stages) <= self.memory


def check_options(args: Namespace) -> None:
    """Refuse options of a plan that say nothing.

    Args:
        args: as parsed.

    Raises:
        ValueError: naming the option.
    """
    given = {
        "search": args.search,
        "gpus": args.gpus,
        "gpu_memory": args.gpu_memory,
        "utilization": args.utilization,
    }
    for option, value in given.items():
        if not args.dry_run and value:
            flag = option.replace("_", "-")
            raise ValueError(
                f"{option} ({value}) must come with dry_run (False). Add --dry-run, or leave "
                f"--{flag} out."
            )
        if value is not None and value is not False and value <= 0:
            raise ValueError(f"{option} ({value}) must be above 0. Use another.")
    if args.utilization is not None and args.utilization > 1:
        raise ValueError(
            f"utilization ({args.utilization}) must be at most 1: it is a share of what the GPU "
            "could compute. Use 0.4 for 40%."
        )
    if args.dry_run:
        find_gpu(args.gpu)


def make_plan(args: Namespace, model: DecoderModelConfig) -> Plan:
    """Counts every pipeline rank of a layout, and estimates how long it takes.

    Args:
        args: Megatron's validated arguments, with those of PlanOptions.
        model: of the run.

    Raises:
        NotImplementedError: what cannot be counted without a GPU.
    """
    model, counted = _prepare(model, args), args.num_experts is None
    chunks = chunk_layers(model.transformer)
    stages = args.pipeline_model_parallel_size
    replicas = args.data_parallel_size
    micro_batches = args.global_batch_size // (args.micro_batch_size * replicas)
    found = []
    for stage in range(stages):
        mine = range(stage, len(chunks), stages)
        with fake_rank(model.transformer, stage):
            footprints = [_count(args, model, chunks, place, counted) for place in mine]
        static = count_static(
            args,
            model.transformer,
            sum(chunk.parameters for chunk in footprints),
            sum(chunk.expert_parameters for chunk in footprints),
        )
        held = None
        if counted:
            group = model.transformer.microbatch_group_size_per_vp_stage or stages
            order = passes(stages, stage, len(mine), micro_batches, group)
            held = most_held(order, footprints)
        found.append(Stage([chunks[place] for place in mine], footprints, static, held))
    return _finish(args, model, found, micro_batches)


def _prepare(model: DecoderModelConfig, args: Namespace) -> DecoderModelConfig:
    """The model with modules that fake tensors pass through on a CPU."""
    config = copy(model.transformer)
    for option in ("fp8", "fp4"):
        if getattr(config, option):
            raise NotImplementedError(
                f"{option} ({getattr(config, option)}) is not planned: only Transformer Engine "
                "knows what it keeps. Leave it out of the plan, which is then of bf16."
            )
    config.transformer_impl = "local"
    config.perform_initialization = False
    if config.activation_func is F.silu and not config.bias_activation_fusion:
        config.activation_func = Silu.apply
    prepared = copy(model)
    prepared.transformer = config
    return prepared


def _count(
    args: Namespace, model: DecoderModelConfig, chunks: list[range], place: int, counted: bool
) -> Footprint:
    chunk = build_chunk(model, place, len(chunks))
    if not counted:  # which expert a token goes to is no matter of shapes
        return Footprint(*count_parameters(chunk))
    sequence = args.seq_length // args.context_parallel_size
    last = place == len(chunks) - 1
    try:
        return measure(chunk, args.micro_batch_size, sequence, chunks[place], last)
    except UNKNOWN as error:
        raise NotImplementedError(
            f"architecture ({args.architecture}) is not planned with these options: it reads "
            f"values of tensors, and here there are none ({error}). Leave out what needs them."
        ) from error


def _finish(
    args: Namespace, model: DecoderModelConfig, stages: list[Stage], micro_batches: int
) -> Plan:
    config, gpu = model.transformer, find_gpu(args.gpu)
    every = [chunk for stage in stages for chunk in stage.chunks]
    sides = args.tensor_model_parallel_size * args.context_parallel_size
    tokens = args.micro_batch_size * args.seq_length
    flops = 3.0 * sides * sum(chunk.forward_flops for chunk in every) / tokens
    plain = count_training_flops(
        SimpleNamespace(
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_query_groups,
            kv_channels=config.kv_channels,
            ffn_hidden_size=config.ffn_hidden_size * (1 if config.gated_linear_unit else 2 / 3),
            seq_length=args.seq_length,
            vocab_size=args.padded_vocab_size,
        )
    )
    utilization, source, reached = _utilization(args)
    speed = None
    if flops:
        layout = Layout(
            chunks=len(stages[0].chunks),
            micro_batches=micro_batches,
            tensor_parallel=args.tensor_model_parallel_size,
            context_parallel=args.context_parallel_size,
            data_parallel=args.data_parallel_size,
            gradient_bytes=max(stage.static.gradients for stage in stages),
            overlapped=args.overlap_grad_reduce,
        )
        rate = utilization * gpu.flops * (flops / plain if reached else 1.0)
        speed = estimate([stage.chunks for stage in stages], layout, gpu, rate)
    steps = args.train_iters or (args.train_samples or 0) // args.global_batch_size
    memory = round((args.gpu_memory or gpu.memory) * GB)
    return Plan(
        *(stages, micro_batches, flops, plain, gpu, memory, (utilization, source), speed, steps),
        tuple(_notes(args)),
    )


def _notes(args: Namespace) -> Iterator[str]:
    if args.transformer_impl == "transformer_engine":
        yield "activations are those of the local backend; Transformer Engine keeps others"
    elif args.context_parallel_size > 1 and args.device != "cpu":
        yield (
            "a GPU also keeps gathered K and V, unless core attention is recomputed "
            "(docs/parallelism.md); they are not counted"
        )
    if args.dataloader_inter_document_masking or args.reset_attention_mask:
        yield "attention is counted over whole samples, not over their documents"


def _utilization(args: Namespace) -> tuple[float, str, bool]:
    """MFU, where from, and whether what the architecture adds is in it already."""
    if args.utilization is not None:
        return args.utilization, "as given", True
    measured = find_architecture(args.architecture).mfu
    where = "measured on one H200 at 130m (docs/performance.md)"
    if measured is not None:
        return measured, where, True
    plain = find_architecture(PLAIN).mfu
    assert plain is not None
    return plain, f"of a plain Transformer, {where}; {args.architecture} was not timed", False
