"""Command-line flags: those this project adds, the defaults it changes, what it refuses.

All of Megatron-LM's flags keep their names and meanings; an explicit flag always wins over a
changed default. Must not know: modules, process groups, data files.
"""

import importlib.util
import os
from argparse import ArgumentParser, Namespace
from typing import Any

from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import parse_args

from megatron_satformer.config import ValueResidualOptions, check_value_residual

# The model family's defaults where Megatron's are GPT-2's.
FAMILY_DEFAULTS: dict[str, Any] = {
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
    "position_embedding_type": "rope",
    "swiglu": True,
    "add_bias_linear": False,
    "qk_layernorm": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "lr_decay_style": "cosine",
    "create_attention_mask_in_dataloader": False,
}
# The way back from a default that Megatron has no flag against.
COUNTER_FLAGS = {
    "--no-swiglu": ("swiglu", False, "Use a plain GeLU MLP."),
    "--no-qk-layernorm": ("qk_layernorm", False, "Do not normalise queries and keys."),
    "--add-bias-linear": ("add_bias_linear", True, "Give linear layers a bias."),
}
TE_INSTALL = "pip install --no-build-isolation 'transformer_engine[pytorch]'"


def add_arguments(parser: ArgumentParser, defaults: dict[str, Any] | None = None) -> ArgumentParser:
    """Megatron's `extra_args_provider`: our one group, and the family's defaults.

    Args:
        parser: with all of Megatron's flags.
        defaults: overrides of FAMILY_DEFAULTS (from `resolve_defaults`).
    """
    group = ArgumentGroupFactory(ValueResidualOptions).build_group(parser, "satformer")
    group.add_argument(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="Where to run. auto: cuda where there is a GPU, else cpu (gloo, every parallel "
        "layout, for tests and small models).",
    )
    for flag, (dest, value, text) in COUNTER_FLAGS.items():
        action = "store_true" if value else "store_false"
        group.add_argument(flag, dest=dest, action=action, help=text)
    _mend_help(parser)
    parser.set_defaults(**FAMILY_DEFAULTS | {"transformer_impl": None} | (defaults or {}))
    return parser


def _mend_help(parser: ArgumentParser) -> None:
    # Some of Megatron's help texts (0.19.2) hold a bare "%", and --help would die on it.
    for action in parser._actions:
        try:
            (action.help or "") % vars(action)
        except (ValueError, TypeError, KeyError):
            action.help = str(action.help).replace("%", "%%")


def preview_arguments() -> Namespace:
    """Parse the command line once, before anything is imported, built or validated for it.

    Raises:
        SystemExit: as argparse, for an unknown flag, a bad choice or --help.
    """
    return parse_args(extra_args_provider=add_arguments)


def resolve_defaults(preview: Namespace, cuda: bool) -> dict[str, Any]:
    """Defaults that depend on the machine or on other flags, for the final parse.

    Args:
        preview: from `preview_arguments`.
        cuda: whether the run uses CUDA.
    """
    defaults: dict[str, Any] = {}
    if preview.squared_relu or preview.quick_geglu:
        defaults["swiglu"] = False
    if preview.use_rotary_position_embeddings:
        defaults["position_embedding_type"] = "rope"
    if preview.transformer_impl is None:
        engine = cuda and has_transformer_engine()
        defaults["transformer_impl"] = "transformer_engine" if engine else "local"
    if preview.reset_attention_mask:
        defaults["create_attention_mask_in_dataloader"] = True
    if str(preview.attention_backend) == "AttnBackend.local":
        defaults["spec"] = ["local"]  # Megatron asks for it; taken back by finish_arguments
    if (defaults.get("transformer_impl") or preview.transformer_impl) == "local":
        # Fused kernels of Transformer Engine and apex that the local backend does not have.
        defaults |= {"no_persist_layer_norm": True, "masked_softmax_fusion": False}
    if not _importable("fused_weight_gradient_mlp_cuda"):  # apex's; the output layer needs it
        defaults["gradient_accumulation_fusion"] = False
    if not cuda:
        defaults |= {
            "distributed_backend": "gloo",
            "bias_swiglu_fusion": False,
            "bias_gelu_fusion": False,
            "bias_dropout_fusion": False,
            "apply_rope_fusion": False,
        }
    elif not has_transformer_engine():
        defaults["apply_rope_fusion"] = False
    return defaults


def finish_arguments(args: Namespace) -> Namespace:
    """Undo what only Megatron's validation needed."""
    if args.spec == ["local"]:
        args.spec = None
    return args


def has_transformer_engine() -> bool:
    """Whether Transformer Engine imports (a half-installed one raises FileNotFoundError)."""
    if not _importable("transformer_engine"):
        return False
    try:
        from megatron.core.extensions.transformer_engine import HAVE_TE
    except (ImportError, FileNotFoundError, OSError):
        return False
    return bool(HAVE_TE)


def _importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def check_arguments(preview: Namespace, cuda: bool) -> None:
    """Refuse what cannot work, before any process group or data exists.

    Args:
        preview: from `preview_arguments`.
        cuda: whether the run uses CUDA.

    Raises:
        ValueError: an option that contradicts another.
        NotImplementedError: a combination that is not supported, with the reason.
    """
    _check_engine(preview, cuda)
    _check_heads(preview)
    _check_tokenizer(preview)
    _check_task(preview)
    if preview.spec is not None:
        raise ValueError(
            f"spec ({' '.join(preview.spec)}) must not be given: --architecture "
            f"({preview.architecture}) chooses the layer. Leave --spec out."
        )
    if preview.architecture == "transformer":
        return
    _check_value_residual(preview)


def _check_engine(preview: Namespace, cuda: bool) -> None:
    if not cuda and (has_transformer_engine() or _importable("amp_C")):
        raise ValueError(
            f"device ({preview.device}) is the CPU, and Transformer Engine or apex is installed: "
            "Megatron takes their CUDA optimizers wherever they import. Use an environment without "
            "them, or run on a GPU."
        )
    wants_engine = {
        "transformer_impl": preview.transformer_impl == "transformer_engine",
        "fp8_format": preview.fp8 is not None,
        "context_parallel_size": preview.context_parallel_size > 1,
        "dataloader_inter_document_masking": preview.dataloader_inter_document_masking,
    }
    values = vars(preview) | {"fp8_format": preview.fp8}
    if "layernorm" in (preview.recompute_modules or []):
        wants_engine["recompute_modules"] = True  # Megatron's recomputed norm asks TE about fp8
    for option, wanted in wants_engine.items():
        if wanted and not has_transformer_engine():
            raise ValueError(
                f"{option} ({values[option]}) needs Transformer Engine, which is not installed. "
                f"Install it ({TE_INSTALL}), or leave --{option.replace('_', '-')} out."
            )
        if wanted and not cuda:
            raise ValueError(
                f"{option} ({values[option]}) needs a GPU: Transformer Engine has no CPU kernels. "
                f"Leave --{option.replace('_', '-')} out, or run with --device cuda."
            )
        if wanted and preview.transformer_impl == "local":
            raise ValueError(
                f"{option} ({values[option]}) must come with --transformer-impl "
                f"transformer_engine, not ({preview.transformer_impl})."
            )


def _check_heads(preview: Namespace) -> None:
    if preview.num_query_groups != 1 and not preview.group_query_attention:
        raise ValueError(
            f"num_query_groups ({preview.num_query_groups}) must come with "
            "--group-query-attention. Add it, or leave --num-query-groups out."
        )


def _check_task(preview: Namespace) -> None:
    tasks = (
        *("sft", "fim_data", "perform_rl_step", "logits_load_dir", "logits_save_dir"),
        "hybrid_context_parallel",
    )
    for option in tasks:
        if getattr(preview, option):
            raise NotImplementedError(
                f"{option} ({getattr(preview, option)}) is not supported: pretrain_satformer.py "
                "trains on plain text from the start of each sample to its end. Leave it out."
            )


def _check_tokenizer(preview: Namespace) -> None:
    needs_file = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
    model = preview.tokenizer_model
    if preview.tokenizer_type in needs_file and not (model and os.path.isfile(model)):
        raise ValueError(
            f"tokenizer_model ({model}) must be an existing file for tokenizer_type "
            f"({preview.tokenizer_type}). Mend the path, or train one (tools/train_tokenizer.py)."
        )


def _check_value_residual(preview: Namespace) -> None:
    if preview.num_layers is not None and not preview.use_checkpoint_args:
        _check_groups_and_range(preview)
    if preview.architecture == "resformer":
        gate_options = {"value_gate": "relu", "value_gate_bias": False, "value_gate_init_std": None}
        for option, default in gate_options.items():
            if getattr(preview, option) != default:
                raise ValueError(
                    f"{option} ({getattr(preview, option)}) must not be given with architecture "
                    "(resformer), which has no gate. Leave it out, or use --architecture satformer."
                )
    reasons = {
        "multi_latent_attention": "its values are not a plain projection of the layer's input",
        "num_experts": "mixture-of-experts layers are not built with a value residual yet",
        "mtp_num_layers": "the prediction layers would need V1 behind the last stage",
        "heterogeneous_layers_config_path": "layers must all project values the same way",
        "hybrid_layer_pattern": "not every layer is an attention layer",
        "yaml_cfg": "the YAML reader knows Megatron's fields only",
        "experimental_attention_variant": "it replaces the attention that V1 is handed to",
        "use_megatron_fsdp": "its sharding does not know the fused gate rows",
        "use_torch_fsdp2": "its sharding does not know the fused gate rows",
        "qk_clip": "it rescales rows of linear_qkv by position, and gate rows are among them",
        "fp8_param_gather": "the fused gate rows cannot be initialised in fp8",
        "pipeline_model_parallel_layout": "a stage without layers cannot pack V1 yet",
        "overlap_moe_expert_parallel_comm": "it replaces the layer's forward",
    }
    for option, reason in reasons.items():
        value = getattr(preview, option, None)
        if value not in (None, False):
            raise NotImplementedError(
                f"{option} ({value}) is not supported with architecture ({preview.architecture}): "
                f"{reason}. Leave it out, or use --architecture transformer."
            )
    if preview.cuda_graph_impl != "none" or preview.enable_cuda_graph:
        raise NotImplementedError(
            f"cuda_graph_impl ({preview.cuda_graph_impl}) is not supported with architecture "
            f"({preview.architecture}): V1 would have to be a static buffer. Leave it out."
        )
    if preview.optimizer not in ("adam", "sgd"):
        raise NotImplementedError(
            f"optimizer ({preview.optimizer}) is not supported with architecture "
            f"({preview.architecture}): it orthogonalises linear_qkv, gate rows included. "
            "Use --optimizer adam or sgd."
        )
    if preview.ckpt_format != "torch_dist":
        raise NotImplementedError(
            f"ckpt_format ({preview.ckpt_format}) is not supported with architecture "
            f"({preview.architecture}): only torch_dist stores gates apart. Leave it out."
        )


def _check_groups_and_range(preview: Namespace) -> None:
    groups = preview.num_query_groups if preview.group_query_attention else None
    check_value_residual(
        architecture=preview.architecture,
        num_layers=preview.num_layers,
        last_k=preview.value_residual_last_k,
        groups=groups or preview.num_attention_heads or 0,
        tp=preview.tensor_model_parallel_size,
    )
