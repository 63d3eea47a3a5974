"""Command-line flags: those this project adds and the defaults it changes.

All of Megatron-LM's flags keep their names and meanings; an explicit flag always wins over a
changed default. Must not know: modules, process groups, data files.
"""

import importlib.util
import sys
from argparse import Action, ArgumentParser, BooleanOptionalAction, Namespace, _ArgumentGroup
from dataclasses import Field
from functools import partial
from typing import Any, NoReturn

from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import parse_args

from megatron_satformer.cli import describe_flag_error
from megatron_satformer.config import DecoderOptions
from megatron_satformer.layout import choose_stages
from megatron_satformer.model.architectures import TABLE, all_architectures, find_architecture
from megatron_satformer.required import NEVER, find_defaults
from megatron_satformer.sizes import SIZES, resolve_schedule, size_defaults, token_count

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
    "bf16": False,
}
# What says which data a run reads; a run that goes on may not change it unasked.
DATA_OPTIONS = (
    *("data_path", "tokenizer", "seq_length", "split", "seed", "dataloader_type", "mock_data"),
    *("reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
)
# The way back from a default that Megatron has no flag against.
COUNTER_FLAGS = {
    "--no-swiglu": ("swiglu", False, "Use a plain GeLU MLP."),
    "--no-qk-layernorm": ("qk_layernorm", False, "Do not normalise queries and keys."),
    "--add-bias-linear": ("add_bias_linear", True, "Give linear layers a bias."),
    "--no-bf16": ("bf16", False, "Train in fp32 where --model-size says bf16."),
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
    add_resume_arguments(parser)
    _add_checkpoint_arguments(parser)
    _add_size(group)
    for flag, (dest, value, text) in COUNTER_FLAGS.items():
        action = "store_true" if value else "store_false"
        group.add_argument(flag, dest=dest, action=action, help=text)
    _mend_help(parser)
    _mend_errors(parser)
    parser.set_defaults(**FAMILY_DEFAULTS | {"transformer_impl": None} | (defaults or {}))
    return parser


def add_resume_arguments(parser: ArgumentParser) -> None:
    """The flags that say what of a run may change when it goes on."""
    group = parser.add_argument_group("going on")
    group.add_argument(
        "--allow-fresh-start",
        action="store_true",
        help="Start at step 0 where --load is missing or holds no whole checkpoint. Without it an "
        "empty --load, or one that is --save and holds no checkpoint, alone starts anew.",
    )
    group.add_argument(
        "--allow-data-change",
        nargs="+",
        choices=DATA_OPTIONS,
        metavar="OPTION",
        help="What of the data may be another than in the run that saved --load: "
        f"{', '.join(DATA_OPTIONS)}.",
    )


def _add_checkpoint_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints and stopping")
    group.add_argument(
        "--keep-last",
        type=int,
        metavar="N",
        help="Keep the N newest checkpoints in --save, and the multiples of --save-retain-interval "
        "besides. Without it all are kept, or with --save-retain-interval the newest alone.",
    )
    group.add_argument(
        "--no-verify-checkpoint",
        dest="verify_checkpoint",
        action="store_false",
        help="Do not read a checkpoint in --load once, on rank 0, to compare its checksums.",
    )
    group.add_argument(
        "--exit-trigger-file",
        metavar="FILE",
        help="End the run as a signal does (--exit-signal-handler) once this file is there: after "
        "the step, with a checkpoint. The file is removed.",
    )


def _add_size(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--model-size",
        choices=list(SIZES),
        help="Shape, batch, learning rate, length and precision of a published size (debug: one "
        "that trains on a CPU in minutes), the same for every architecture. Any flag that is "
        "given wins.",
    )
    group.add_argument(
        "--train-tokens",
        type=token_count,
        metavar="N",
        help="Tokens to train on, 5e9 or 5B say, in place of --train-samples: so many samples of "
        "--seq-length tokens.",
    )
    group.add_argument(
        "--lr-warmup-tokens",
        type=token_count,
        metavar="N",
        help="Tokens over which the learning rate rises, in place of --lr-warmup-samples.",
    )


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


def _mend_errors(parser: ArgumentParser) -> None:
    # argparse would print the usage of all flags, 600 lines, before the one that matters.
    def refuse(message: str) -> NoReturn:
        raise ValueError(describe_flag_error(parser, message))

    parser.error = refuse  # type: ignore[method-assign]


def preview_arguments() -> Namespace:
    """Parse the command line once, before anything is imported, built or validated for it.

    Raises:
        ValueError: an unknown flag or a bad choice.
        SystemExit: --help.
        NotImplementedError: --yaml-cfg, which would replace the whole command line.
    """
    if any(word.split("=")[0] == "--yaml-cfg" for word in sys.argv[1:]):
        raise NotImplementedError(
            "yaml_cfg is not supported: Megatron's YAML reader knows its own fields only, none of "
            "this project's. Give flags on the command line."
        )
    # What a size says of the shape has to be known to the checks that come before the final parse.
    named = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    named.add_argument("--model-size", nargs="?")
    size = named.parse_known_args(sys.argv[1:])[0].model_size
    defaults = size_defaults(size) | {"min_lr": None}
    return parse_args(extra_args_provider=partial(add_arguments, defaults=defaults))


def resolve_defaults(preview: Namespace, cuda: bool) -> dict[str, Any]:
    """Defaults that depend on the machine or on other flags, for the final parse.

    Args:
        preview: from `preview_arguments`.
        cuda: whether the run uses CUDA.

    Raises:
        ValueError: options that contradict each other.
    """
    defaults = size_defaults(preview.model_size) | resolve_schedule(preview)
    defaults |= choose_stages(preview)
    if preview.max_position_embeddings is None:
        defaults["max_position_embeddings"] = preview.seq_length
    if preview.fp16:
        defaults["bf16"] = False
    if preview.step_batch_size_schedule is not None:
        defaults["global_batch_size"] = None
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
    defaults |= find_defaults(preview)
    if preview.exit_trigger_file is not None:
        defaults["exit_signal_handler"] = True
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
    """Undo what only Megatron's validation needed, and take 0 where it means never."""
    if args.spec == ["local"]:
        args.spec = None
    args.eval_interval = args.eval_interval or NEVER
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
