"""Builds the Megatron model of a checkpoint, whole, on one CPU process, whatever layout saved it.

The modules are those that trained it (this project's layer spec, local implementation), so that
their logits can be held against those of an export. Neither megatron.training nor the patches of
the CPU backend are needed for a forward pass, so transformers runs in the same process unharmed.
"""

import logging
import os
import re
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from megatron_satformer.checkpoint.megatron.reader import MegatronCheckpoint
from megatron_satformer.checkpoint.tensor_names import check_tensor_names
from megatron_satformer.unsupported import ONE_CPU, refuse_unsupported

with warnings.catch_warnings():
    # Megatron's optional parts that are not installed
    warnings.simplefilter("ignore")
    from megatron.core.activations import squared_relu
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.fusions.fused_bias_geglu import quick_gelu
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_satformer.config import DecoderConfig
    from megatron_satformer.model.architectures import PLAIN, find_architecture
    from megatron_satformer.model.specs import build_block_spec

# Fields of the config that say how a model is run, not what it computes: their defaults hold here.
EXECUTION = re.compile(
    "parallel|pipeline|p2p|fus(ed|ion)|fuser|recompute|offload|cuda_graph|overlap|tp_comm|fp8|fp4"
    "|dispatcher|deepep|stash|grouped_gemm|cpu_init|perform_init|cp_comm_type|config_logger|params_dtype"
    "|deterministic|autocast|^(fp16|bf16|transformer_impl|attention_backend|quant_recipe|timers)$"
)
ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
POSITIONS = ("rope", "learned_absolute", "none")


@contextmanager
def load_megatron_model(
    checkpoint: MegatronCheckpoint,
    dtype: torch.dtype = torch.float32,
    rounded_to: torch.dtype | None = None,
) -> Iterator[GPTModel]:
    """The model in evaluation mode with the checkpoint's weights; a context, for it needs a group.

    Args:
        checkpoint: Opened.
        dtype: To compute in.
        rounded_to: First round the weights to this dtype, but not what stays float32 in an
            export; None keeps them.

    Raises:
        NotImplementedError: An option that cannot be honoured here.
        ValueError: Tensors that are missing, unknown, or of another shape than the args say.
    """
    args = checkpoint.args
    check_runnable(args)
    with _one_rank() as groups:
        # one entry per layer, or all layers of a kind in one
        apart = any(key.startswith("decoder.layers.0.") for key in checkpoint.tensors)
        with _unseen_construction():
            config = build_transformer_config(args, dtype)
            config.hetereogenous_dist_checkpoint = apart
            model = _build_model(args, config, groups).eval()
        _load_weights(model, checkpoint, rounded_to)
        yield model


@torch.no_grad()
def megatron_logits(model: GPTModel, ids: Tensor, vocab_size: int | None = None) -> Tensor:
    """Runs the model.

    Args:
        model: From `load_megatron_model`.
        ids: Token ids, [b, s].
        vocab_size: Of the tokenizer; logits of rows added as padding are dropped.

    Returns:
        [b, s, vocab_size], in the model's dtype.
    """
    positions = torch.arange(ids.size(1)).expand_as(ids)
    # Megatron marks functions for torch.compile, which costs more than it brings in one pass
    with torch.compiler.set_stance("force_eager"), _cpu_is_current_device():
        logits: Tensor = model(ids, positions, None)
    return logits[..., :vocab_size]


@contextmanager
def _cpu_is_current_device() -> Iterator[None]:
    """The one thing of the CPU backend that a forward pass needs, taken back afterwards.

    RotaryEmbedding.get_emb (0.19.2) moves its frequencies to torch.cuda.current_device().
    """
    plain = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore
    try:
        yield
    finally:
        torch.cuda.current_device = plain


def check_runnable(args: Namespace) -> None:
    """Refuses a checkpoint whose model this file cannot build.

    Raises:
        NotImplementedError: Names the option.
    """
    refuse_unsupported(args, ONE_CPU)
    if (kind := _positions(args)) not in POSITIONS:
        why = "Megatron reads its options in training alone"
        raise ONE_CPU.refusal("position_embedding_type", kind, why=why)


@contextmanager
def _one_rank() -> Iterator[ProcessGroupCollection]:
    """A process group of this process alone, in every role that Megatron knows."""
    if torch.distributed.is_initialized():
        raise ValueError(
            "torch.distributed (initialized) must not be in use: a checkpoint's Megatron model "
            "runs on one process. Call this outside of torchrun."
        )
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        world = torch.distributed.group.WORLD
        names = [field.name for field in fields(ProcessGroupCollection)]
        yield ProcessGroupCollection(**dict.fromkeys(names, world))
    finally:
        torch.distributed.destroy_process_group()


def _build_model(
    args: Namespace, config: DecoderConfig, groups: ProcessGroupCollection
) -> GPTModel:
    # megatron.training's gpt_config_from_args and GPTModelBuilder, 0.19.2; like them without
    # args.rope_scaling_factor, which training ignores
    model = GPTModel(
        config=config,
        transformer_layer_spec=build_block_spec(config, pp_rank=0),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=_positions(args),
        rotary_percent=getattr(args, "rotary_percent", 1.0),
        rotary_base=getattr(args, "rotary_base", 10000),
        rope_scaling=getattr(args, "use_rope_scaling", False),
        seq_len_interpolation_factor=getattr(args, "rotary_seq_len_interpolation_factor", None),
        pg_collection=groups,
    )
    finish = find_architecture(config.architecture).finish
    if finish is not None:
        finish(model, 0)
    return model


@contextmanager
def _unseen_construction() -> Iterator[None]:
    """Keeps to itself what the constructors of Megatron (0.19.2) do beside building.

    They warn of defaults and say that GPTModel is deprecated, and put the attention backend into
    the environment, where they refuse any other one from then on.
    """
    log = logging.getLogger("megatron.core.models.gpt.gpt_model")
    level, before = log.level, {name: os.environ.pop(name, None) for name in ATTENTION_VARIABLES}
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def build_transformer_config(args: Namespace, dtype: torch.dtype) -> DecoderConfig:
    """What the args compute, to be run by the local implementation on one rank.

    Args:
        args: Of a checkpoint, as Megatron's parser made them.
        dtype: Of parameters and activations.

    Source: megatron.training's core_transformer_config_from_args (0.19.2).
    """
    config_class = find_architecture(getattr(args, "architecture", PLAIN)).config
    options: dict[str, Any] = {
        field.name: getattr(args, field.name)
        for field in fields(config_class)
        if field.init and hasattr(args, field.name) and not EXECUTION.search(field.name)
    }
    options["architecture"] = getattr(args, "architecture", PLAIN)
    options["num_moe_experts"] = getattr(args, "num_experts", None)
    # older releases have it under this name
    epsilon = getattr(args, "norm_epsilon", None) or args.layernorm_epsilon
    options["layernorm_epsilon"] = epsilon
    if not args.group_query_attention:
        options["num_query_groups"] = None
    if args.swiglu:
        options |= {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
    elif getattr(args, "squared_relu", False):
        options["activation_func"] = squared_relu
    elif getattr(args, "quick_geglu", False):
        options |= {"gated_linear_unit": True, "activation_func": quick_gelu}
    return config_class(
        **options,
        params_dtype=dtype,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        transformer_impl="local",
        use_cpu_initialization=True,
        perform_initialization=False,
    )


def _positions(args: Namespace) -> str:
    return getattr(args, "position_embedding_type", "learned_absolute")


@torch.no_grad()
def _load_weights(
    model: GPTModel, checkpoint: MegatronCheckpoint, rounded_to: torch.dtype | None
) -> None:
    for parameter in model.parameters():
        parameter.zero_()  # rows that no checkpoint holds: padding, biases nobody asked for
    state = model.sharded_state_dict(metadata={"dp_cp_group": torch.distributed.group.WORLD})
    apply_factories(state)
    entries = [entry for entry in nested_values(state) if isinstance(entry, ShardedTensor)]
    check_tensor_names(
        {key: stored.size for key, stored in checkpoint.tensors.items()},
        {entry.key: entry.global_shape for entry in entries},
        f"{checkpoint.folder} does not fit its own args",
    )
    own = find_architecture(model.config.architecture).by_key(model.config)
    wide = {key for key, tensor in own.items() if tensor.fp32}
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for (key, index), pieces in groupby(entries, _stored_at):
        tensor = checkpoint.read(key, index)
        if rounded_to is not None and key not in wide:
            tensor = tensor.to(rounded_to)
        for entry in pieces:
            # what is written here must be the parameter and not a copy
            assert entry.data.untyped_storage().data_ptr() in storages, key
            entry.data.copy_(_piece(tensor, entry))


def _stored_at(entry: ShardedTensor) -> tuple[str, int | None]:
    """Key and, where layers or experts are stacked, number on the first axis."""
    return entry.key, entry.global_offset[0] if entry.prepend_axis_num else None


def _piece(tensor: Tensor, entry: ShardedTensor) -> Tensor:
    stacked = min(entry.prepend_axis_num, 1)
    for begin in entry.global_offset[stacked : entry.prepend_axis_num]:
        tensor = tensor[begin]
    for axis, size in enumerate(entry.local_shape):
        tensor = tensor.narrow(axis, entry.global_offset[entry.prepend_axis_num + axis], size)
    return tensor
