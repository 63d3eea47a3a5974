"""What cannot work, refused before any process group or data exists.

One line from rank 0, in the form *option (value) must ... other (value). What to do.* A user's
contradiction is a ValueError, an unsupported combination a NotImplementedError with its reason.
Must not know: modules, process groups, data files.
"""

import os
from argparse import Namespace
from typing import Any

from megatron.core.dist_checkpointing.strategies.torch import get_async_strategy

from megatron_satformer.arguments import has_transformer_engine, importable
from megatron_satformer.config import DecoderConfig
from megatron_satformer.model.architectures import all_architectures, find_architecture
from megatron_satformer.unsupported import (
    ARCHITECTURE,
    LOCAL_BACKEND,
    MEGATRONS_ATTENTION,
    TRAINING,
    Table,
    refuse_unsupported,
)

TE_INSTALL = "pip install --no-build-isolation 'transformer_engine[pytorch]'"
NOT_GIVEN = (None, False)
# What only Transformer Engine computes, named by its flag: -> attribute, where that differs.
_SAME_NAME = """
    hierarchical_context_parallel_sizes te_precision_config_file te_rng_tracker tp_comm_overlap
    delay_wgrad_compute log_max_attention_logit qk_clip fine_grained_activation_offloading
    cpu_offloading_num_layers fp32_residual_connection fused_residual_rmsnorm
    use_te_activation_func use_transformer_engine_op_fuser use_grouped_gemm_for_dense_mlp
    batch_invariant_mode moe_grouped_gemm moe_latent_size moe_permute_fusion moe_router_fusion
    use_grouped_gemm_for_shared_expert overlap_dispatch_backward_with_experts_wgrad
"""
ENGINE_ONLY = {
    "fp8_format": "fp8",
    "fp4_format": "fp4",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
} | {name: name for name in _SAME_NAME.split()}


def check_arguments(preview: Namespace, cuda: bool) -> None:
    """Refuse what cannot work, before any process group or data exists.

    Args:
        preview: from `arguments.preview_arguments`.
        cuda: whether the run uses CUDA.

    Raises:
        ValueError: an option that contradicts another.
        NotImplementedError: a combination that is not supported, with the reason.
    """
    _check_device(preview, cuda)
    if preview.spec is not None:
        raise ValueError(
            f"spec ({' '.join(preview.spec)}) must not be given: --architecture "
            f"({preview.architecture}) chooses the layer. Leave --spec out."
        )
    _check_heads(preview)
    _check_architecture(preview)
    check_model(preview, cuda)
    _check_tokenizer(preview)
    _check_async_save(preview)
    _check_skipping(preview)
    if preview.use_mup and not preview.scaled_output_init:
        raise ValueError(
            "use_mup (True) must come with --scaled-output-init: it scales the init of the output "
            "projections itself. Add it, or leave --use-mup out."
        )


def check_model(args: Namespace, cuda: bool) -> None:
    """The part of `check_arguments` that a checkpoint can bring in (--use-checkpoint-args).

    Args:
        args: as parsed, or the final arguments.
        cuda: whether the run uses CUDA.

    Raises:
        ValueError: an option that contradicts another.
        NotImplementedError: a combination that is not supported, with the reason.
    """
    refuse_unsupported(args, TRAINING)
    backend = _backend(args, cuda)
    _check_engine(args, cuda, backend)
    _check_attention(args, backend)
    _check_experts(args, cuda, backend)
    _check_muon(args)


def _check_device(preview: Namespace, cuda: bool) -> None:
    if not cuda and (has_transformer_engine() or importable("amp_C")):
        raise ValueError(
            f"device ({preview.device}) is the CPU, and Transformer Engine or apex is installed: "
            "Megatron takes their CUDA optimizers wherever they import. Use an environment without "
            "them, or run on a GPU."
        )


def _check_engine(preview: Namespace, cuda: bool, chosen: str) -> None:
    if chosen not in ("local", "transformer_engine"):
        raise NotImplementedError(
            f"transformer_impl ({chosen}) is not supported: its layers are made for inference. Use "
            "--transformer-impl transformer_engine or local."
        )
    for option, value in _wants_engine(preview).items():
        if not has_transformer_engine():
            raise ValueError(
                f"{option} ({value}) needs Transformer Engine, which is not installed. "
                f"Install it ({TE_INSTALL}), or leave --{option.replace('_', '-')} out."
            )
        if not cuda:
            raise ValueError(
                f"{option} ({value}) needs a GPU: Transformer Engine has no CPU kernels. "
                f"Leave --{option.replace('_', '-')} out, or run with --device cuda."
            )
        if chosen == "local":
            raise ValueError(
                f"{option} ({value}) must come with --transformer-impl transformer_engine, not "
                f"({chosen})."
            )
    if chosen == "local":
        own = str(preview.attention_backend) == "AttnBackend.local"
        refuse_unsupported(preview, MEGATRONS_ATTENTION if own else LOCAL_BACKEND)


def _check_attention(preview: Namespace, backend: str) -> None:
    """Context parallelism, packed documents and windows, each and together."""
    cp = preview.context_parallel_size
    if preview.seq_length and cp > 1 and preview.seq_length % (2 * cp):
        raise ValueError(
            f"seq_length ({preview.seq_length}) must be a multiple of {2 * cp}, twice "
            f"context_parallel_size ({cp}): every rank holds two chunks. Change one of them."
        )
    packs = _packs_documents(preview)
    if backend != "local":
        if packs and cp > 1:
            raise NotImplementedError(
                f"{packs} (True) is not supported with context_parallel_size ({cp}) by Transformer "
                "Engine: Megatron 0.19.2 cuts the sample over ranks, and Transformer Engine every "
                "document. Use --transformer-impl local."
            )
        return
    size = preview.window_size
    if str(preview.attention_backend) == "AttnBackend.local":
        if size and preview.reset_attention_mask:
            raise ValueError(
                f"window_size ({size}) must not come with --reset-attention-mask and "
                "--attention-backend local: Megatron's own attention would see past the ends of "
                "documents. Leave --attention-backend out."
            )
        return
    if size is not None and (len(size) != 2 or size[0] < -1 or size[1] not in (-1, 0)):
        raise ValueError(
            f"window_size ({size}) must be N,0, for N tokens before a token's own (-1: all): "
            "attention is causal. Use --window-size N,0."
        )
    wanted = {
        "context_parallel_size": cp > 1 and cp,
        "window_size": size,
        packs or "reset_attention_mask": packs and True,
    }
    for option, value in wanted.items():
        if value not in NOT_GIVEN and preview.attention_dropout:
            raise ValueError(
                f"attention_dropout ({preview.attention_dropout}) must be 0 with {option} "
                f"({value}): the local backend's attention drops nothing there. Leave it out, or "
                "use --transformer-impl transformer_engine."
            )
    if cp > 1 and preview.num_experts:
        raise NotImplementedError(
            f"context_parallel_size ({cp}) is not supported with num_experts "
            f"({preview.num_experts}) on the local backend: it has not trained like one rank. "
            "Leave one of them out, or use --transformer-impl transformer_engine."
        )
    kinds = set(preview.cp_comm_type or ()) - {"p2p", "allgather"}
    if cp > 1 and kinds:
        raise ValueError(
            f"cp_comm_type ({' '.join(preview.cp_comm_type)}) must be allgather without "
            "Transformer Engine, which knows no other way. Leave it out."
        )


def _packs_documents(preview: Namespace) -> str | None:
    """The option that keeps documents apart by their bounds."""
    own_mask = str(preview.attention_backend) == "AttnBackend.local"
    if preview.dataloader_inter_document_masking:
        return "dataloader_inter_document_masking"
    return "reset_attention_mask" if preview.reset_attention_mask and not own_mask else None


def _backend(preview: Namespace, cuda: bool) -> str:
    engine = cuda and has_transformer_engine()
    return preview.transformer_impl or ("transformer_engine" if engine else "local")


def _wants_engine(preview: Namespace) -> dict[str, Any]:
    wanted = {option: getattr(preview, name) for option, name in ENGINE_ONLY.items()}
    wanted = {option: value for option, value in wanted.items() if value not in NOT_GIVEN}
    if preview.transformer_impl == "transformer_engine":
        wanted["transformer_impl"] = preview.transformer_impl
    if {"layernorm", "moe_act"} & set(preview.recompute_modules or []):
        # Megatron's recomputed norm asks TE about fp8; moe_act wants grouped GEMMs.
        wanted["recompute_modules"] = " ".join(preview.recompute_modules)
    return wanted


def _check_heads(preview: Namespace) -> None:
    if preview.num_query_groups != 1 and not preview.group_query_attention:
        raise ValueError(
            f"num_query_groups ({preview.num_query_groups}) must come with "
            "--group-query-attention. Add it, or leave --num-query-groups out."
        )


def _check_tokenizer(preview: Namespace) -> None:
    needs_file = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
    model = preview.tokenizer_model
    if preview.tokenizer_type in needs_file and not (model and os.path.isfile(model)):
        raise ValueError(
            f"tokenizer_model ({model}) must be an existing file for tokenizer_type "
            f"({preview.tokenizer_type}). Mend the path, or train one (tools/train_tokenizer.py)."
        )


def _check_async_save(preview: Namespace) -> None:
    if not preview.async_save:
        return
    if not preview.use_persistent_ckpt_worker:
        raise ValueError(
            "async_save (True) must come with --use-persistent-ckpt-worker: Megatron 0.19.2 turns "
            "it off otherwise. Add it, or leave --async-save out."
        )
    try:
        get_async_strategy(preview.async_strategy)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"async_strategy ({preview.async_strategy}) needs a version of nvidia-resiliency-ext "
            "that Megatron 0.19.2 can use, and there is none. Install one, or use "
            "--async-strategy mcore."
        ) from error


def _check_skipping(preview: Namespace) -> None:
    for option, needed in {
        "rerun_mode": "validate_results",
        "error_injection_rate": 0,
        "optimizer_cuda_graph": False,  # the captured step is made whole
        "check_for_nan_in_loss_and_grad": True,
    }.items():
        value = getattr(preview, option)
        if preview.skip_nan_steps and value != needed:
            raise ValueError(
                f"{option} ({value}) must be ({needed}) with skip_nan_steps "
                f"({preview.skip_nan_steps}): bad steps are not found otherwise. Leave one of them "
                "out."
            )


def _check_muon(args: Namespace) -> None:
    if args.optimizer not in ("muon", "dist_muon"):
        return
    if not importable("emerging_optimizers"):
        raise ValueError(
            f"optimizer ({args.optimizer}) needs the package emerging-optimizers, which is not "
            "installed. Install it (pip install 'emerging-optimizers==0.3.0'), or use adam."
        )
    layer_wise = args.use_distributed_optimizer or args.optimizer == "dist_muon"
    if (layer_wise or getattr(args, "use_layer_wise_distributed_optimizer", False)) and (
        not args.bf16
    ):
        raise ValueError(
            f"optimizer ({args.optimizer}) whose matrices are shared out over data-parallel ranks "
            "must come with bf16 (True): Megatron 0.19.2 cannot do it in fp32. Add --bf16, or "
            "leave --use-distributed-optimizer out and use --optimizer muon."
        )


def _check_experts(preview: Namespace, cuda: bool, backend: str) -> None:
    if not preview.num_experts:
        return
    tp, sequence_parallel = preview.tensor_model_parallel_size, preview.sequence_parallel
    if tp > 1 and not sequence_parallel:
        raise ValueError(
            f"sequence_parallel (False) must be on for num_experts ({preview.num_experts}) with "
            f"tensor_model_parallel_size ({tp}): Megatron's experts train in no other way. Add "
            "--sequence-parallel."
        )
    if preview.add_bias_linear:
        shared = preview.moe_shared_expert_intermediate_size
        if shared:
            raise ValueError(
                "add_bias_linear (True) must be off for moe_shared_expert_intermediate_size "
                f"({shared}): Megatron's shared experts have no bias. Leave --add-bias-linear out."
            )
        if backend == "local":
            raise ValueError(
                f"add_bias_linear (True) must be off for num_experts ({preview.num_experts}) "
                "without Transformer Engine: Megatron 0.19.2 adds the bias of an expert in place, "
                "which autograd forbids. Leave --add-bias-linear out."
            )
    if preview.moe_token_dispatcher_type == "flex" and not cuda:
        raise ValueError(
            "moe_token_dispatcher_type (flex) needs a GPU: its backends are CUDA libraries. Use "
            "--moe-token-dispatcher-type alltoall or allgather."
        )


def _check_architecture(preview: Namespace) -> None:
    """What the architecture's record declares: its options, its shapes, what it refuses."""
    architecture = find_architecture(preview.architecture)
    beside = f"with architecture ({architecture.name})"
    for other in all_architectures():
        for option, default in other.own_options.items():
            value = getattr(preview, option)
            if option not in architecture.own_options and value != default:
                owners = [a.name for a in all_architectures() if option in a.own_options]
                raise ValueError(
                    f"{option} ({value}) must not be given {beside}, which does not have it. Leave "
                    f"it out, or use --architecture {' or '.join(owners)}."
                )
    if preview.num_layers is not None and not preview.use_checkpoint_args:
        groups = preview.num_query_groups if preview.group_query_attention else None
        architecture.config.check_options(
            preview,
            num_layers=preview.num_layers,
            groups=groups or preview.num_attention_heads or 0,
            tp=preview.tensor_model_parallel_size,
        )
    rows: Table = {(ARCHITECTURE,): architecture.refuses}
    refuse_unsupported(preview, ARCHITECTURE, rows, architecture=architecture.name)


def check_carry(config: DecoderConfig) -> None:
    """Refuse what has not run, or cannot, where layers carry tensors beside hidden_states.

    Args:
        config: the model.

    Raises:
        NotImplementedError: a combination that is not supported, with the reason.
    """
    carries = find_architecture(config.architecture).carries(config)
    beside = f" with architecture ({config.architecture})"
    if carries.streams and config.distribute_saved_activations:
        raise NotImplementedError(
            f"distribute_saved_activations (True) is not supported{beside}: it cuts a tensor that "
            "later layers still read. Leave it out."
        )
    if any(carries) and config.recompute_granularity == "full" and (config.fp8 or config.fp4):
        raise NotImplementedError(
            f"recompute_granularity (full) is not supported with fp8 or fp4{beside}: Transformer "
            "Engine's checkpoint has not been tried with what is carried. Use --recompute-"
            "granularity selective."
        )
