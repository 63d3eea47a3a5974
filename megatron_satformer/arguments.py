"""Command-line flags: those this project adds and the defaults it changes.

All of Megatron-LM's flags keep their names and meanings; an explicit flag always wins over a
changed default. Must not know: modules, process groups, data files.
"""

import importlib.util
import sys
from argparse import Action, ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import Field
from typing import Any

from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import parse_args

from megatron_satformer.config import DecoderOptions
from megatron_satformer.model.architectures import TABLE, all_architectures, find_architecture

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


def add_arguments(parser: ArgumentParser, defaults: dict[str, Any] | None = None) -> ArgumentParser:
    """Megatron's `extra_args_provider`: our groups, and the family's defaults.

    Args:
        parser: with all of Megatron's flags.
        defaults: overrides of FAMILY_DEFAULTS (from `resolve_defaults`).
    """
    group = ArgumentGroupFactory(DecoderOptions).build_group(parser, "decoder")
    _find_action(parser, "architecture").choices = list(TABLE)
    known = set(vars(DecoderOptions()))
    for architecture in all_architectures():
        own = _OwnOptions(architecture.options, exclude=sorted(known))
        own.build_group(parser, architecture.name)
        known |= architecture.own_options.keys()
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


class _OwnOptions(ArgumentGroupFactory):
    # ArgumentGroupFactory's, 0.19.2: what is on by default has flags against it alone, with a help
    # text that speaks for it.
    def _build_argparse_kwargs_from_field(self, attribute: Field) -> dict[str, Any]:
        kwargs = super()._build_argparse_kwargs_from_field(attribute)
        if kwargs.get("action") == "store_false":
            flag = self._format_arg_name(attribute.name)
            kwargs |= {"arg_names": [flag], "action": BooleanOptionalAction}
        return kwargs


def _find_action(parser: ArgumentParser, dest: str) -> Action:
    return next(action for action in parser._actions if action.dest == dest)


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
        NotImplementedError: --yaml-cfg, which would replace the whole command line.
    """
    if any(word.split("=")[0] == "--yaml-cfg" for word in sys.argv[1:]):
        raise NotImplementedError(
            "yaml_cfg is not supported: Megatron's YAML reader knows its own fields only, none of "
            "this project's. Give flags on the command line."
        )
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
    if str(preview.attention_backend) == "AttnBackend.local":
        if preview.reset_attention_mask:
            defaults["create_attention_mask_in_dataloader"] = True
        defaults["spec"] = ["local"]  # Megatron asks for it; taken back by finish_arguments
    elif preview.reset_attention_mask:
        defaults["dataloader_inter_document_masking"] = True  # no other attention reads a mask
    if (defaults.get("transformer_impl") or preview.transformer_impl) == "local":
        # Fused kernels of Transformer Engine and apex that the local backend does not have.
        defaults |= {"no_persist_layer_norm": True, "masked_softmax_fusion": False}
    defaults |= find_architecture(preview.architecture).defaults(preview)
    if not importable("fused_weight_gradient_mlp_cuda"):  # apex's; the output layer needs it
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
    if not importable("transformer_engine"):
        return False
    try:
        from megatron.core.extensions.transformer_engine import HAVE_TE
    except (ImportError, FileNotFoundError, OSError):
        return False
    return bool(HAVE_TE)


def importable(name: str) -> bool:
    """Whether a module of that name is installed; it is not imported."""
    return importlib.util.find_spec(name) is not None
