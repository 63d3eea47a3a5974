"""Whether a run may start from the checkpoint that Megatron is about to read.

Megatron (0.19.2) compares the shape of the model, and only when it resumes. What it would load as
another model, or fail on rank by rank in the middle of loading, is refused here in one line. Must
not know: modules, process groups.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_satformer.checkpoint.hugging_face.origin import find_origin
from megatron_satformer.checkpoint.megatron.reader import TRACKER, open_checkpoint
from megatron_satformer.checkpoint.megatron.vocabulary import known_size, record_vocabulary
from megatron_satformer.model.architectures import PLAIN, find_architecture

# What a Transformer computes, and under which other name older releases of Megatron saved it.
TRANSFORMER_OPTIONS = {
    "num_layers": "",
    "hidden_size": "",
    "ffn_hidden_size": "",
    "num_attention_heads": "",
    "kv_channels": "",
    "normalization": "",
    "layernorm_epsilon": "norm_epsilon",
    "qk_layernorm": "",
    "position_embedding_type": "",
    "rotary_base": "",
    "rotary_percent": "",
    "swiglu": "",
    "add_bias_linear": "",
    "add_qkv_bias": "",
    "untie_embeddings_and_output_weights": "",
}
LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)
START = "Give its folder as --pretrained-checkpoint, which is read until --load holds a checkpoint."


@dataclass(frozen=True)
class Source:
    """The checkpoint that Megatron will read.

    Attributes:
        option: that names it, "load" or "pretrained_checkpoint".
        folder: with the tracker file in it.
        weights_only: whether a new run starts from its weights, rather than the saved run goes on.
    """

    option: str
    folder: Path
    weights_only: bool

    def __str__(self) -> str:
        return f"the checkpoint in {self.option} ({self.folder})"


def find_source(args: Namespace) -> Source | None:
    """The checkpoint that Megatron's load_checkpoint will choose; None: the run starts afresh.

    Args:
        args: Megatron's validated arguments.

    Raises:
        ValueError: there is none where one was promised.
    """
    if args.load is not None and _holds_checkpoint(args.load):
        return Source("load", Path(args.load), args.finetune)
    if args.pretrained_checkpoint is None:
        return None
    if not _holds_checkpoint(args.pretrained_checkpoint):
        raise ValueError(
            f"pretrained_checkpoint ({args.pretrained_checkpoint}) must hold a checkpoint, and "
            f"there is no {TRACKER} in it. Mend the path, or leave it out."
        )
    return Source("pretrained_checkpoint", Path(args.pretrained_checkpoint), True)


def _holds_checkpoint(folder: str) -> bool:
    return (Path(folder) / TRACKER).is_file()


def starts_from_transformer(args: Namespace) -> bool:
    """Whether the weights to be read are a plain Transformer's (--from-transformer).

    False when a run that once started so is resumed, with the same command line, from its own
    checkpoint in --load.

    Args:
        args: Megatron's validated arguments.
    """
    source = find_source(args) if args.from_transformer else None
    return source is not None and source.weights_only


def check_resume(args: Namespace) -> Namespace | None:
    """Refuse a checkpoint that does not fit the options.

    Args:
        args: Megatron's validated arguments.

    Returns:
        The arguments of the checkpoint; None where there is none of format torch_dist.

    Raises:
        ValueError: naming the option, its value, and the way out.
        NotImplementedError: --from-transformer with an architecture that cannot start as one.
    """
    source = find_source(args)
    if args.from_transformer:
        _check_from_transformer(args, source)
    if source is None or args.ckpt_format != "torch_dist":
        return None
    saved = open_checkpoint(source.folder, args.ckpt_step).args
    if starts_from_transformer(args):
        _check_same_transformer(args, saved, source)
        _check_vocabulary(args, saved, source)
        return saved
    _check_same_model(args, saved, source)
    if not source.weights_only:
        _check_vocabulary(args, saved, source)
    _check_no_row_is_lost(args, saved, source)
    if not (source.weights_only or args.no_load_optim or getattr(saved, "no_save_optim", False)):
        _check_optimizer(args, saved, source)
    return saved


def hand_on(args: Namespace, saved: Namespace | None, entries: int) -> None:
    """Puts into a run's arguments, and so its checkpoints, what Megatron has no option for.

    Args:
        args: Megatron's validated arguments.
        saved: From `check_resume`.
        entries: Of the run's tokenizer.
    """
    record_vocabulary(args, saved, entries)
    if saved is not None and (origin := find_origin(saved)) is not None:
        origin.put_into(args)


def _check_from_transformer(args: Namespace, source: Source | None) -> None:
    reason = find_architecture(args.architecture).from_transformer
    if reason is not None:
        raise NotImplementedError(
            f"from_transformer (True) is not supported with architecture ({args.architecture}): "
            f"{reason}. Leave it out, or use another architecture."
        )
    if source is None:
        raise ValueError(
            f"from_transformer (True) must come with a checkpoint, and load ({args.load}) holds "
            f"none. {START}"
        )


def _check_same_transformer(args: Namespace, saved: Namespace, source: Source) -> None:
    theirs = getattr(saved, "architecture", PLAIN)
    if theirs != PLAIN:
        raise ValueError(
            f"from_transformer (True) must be given with a Transformer's checkpoint, and {source} "
            f"is that of architecture ({theirs}). Leave --from-transformer out."
        )
    _check_same_options(args, saved, source, TRANSFORMER_OPTIONS)


def _check_same_options(
    args: Namespace, saved: Namespace, source: Source, options: Mapping[str, str]
) -> None:
    compared: dict[str, tuple[Any, Any]] = {
        option: (getattr(args, option), getattr(saved, option, getattr(saved, older, None)))
        for option, older in options.items()
    }
    compared["num_query_groups"] = _query_groups(args), _query_groups(saved)
    for option, (mine, theirs) in compared.items():
        if theirs is not None and mine != theirs:
            raise ValueError(
                f"{option} ({mine}) must be that of {source}, which is ({theirs}), for the run to "
                "go on as that model. Give it on the command line."
            )


def _query_groups(args: Namespace) -> int:
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads


def _check_same_model(args: Namespace, saved: Namespace, source: Source) -> None:
    # What an older checkpoint does not name was not there when it was saved: its default.
    defaults = {"architecture": PLAIN} | find_architecture(args.architecture).model_options
    for option, default in defaults.items():
        mine, theirs = getattr(args, option), getattr(saved, option, default)
        if mine == theirs:
            continue
        way = "Give it on the command line, or load another checkpoint."
        startable = find_architecture(args.architecture).from_transformer is None
        if option == "architecture" and theirs == PLAIN and startable:
            way = f"To start a {mine} from its weights, add --from-transformer. {START}"
        raise ValueError(f"{option} ({mine}) must be that of {source}, which is ({theirs}). {way}")
    # A model is fine-tuned to longer texts with another base of its rotary embedding.
    free = {"rotary_base"} if source.weights_only else set()
    fixed = {option: older for option, older in TRANSFORMER_OPTIONS.items() if option not in free}
    _check_same_options(args, saved, source, fixed)


def _check_vocabulary(args: Namespace, saved: Namespace, source: Source) -> None:
    mine, theirs = args.padded_vocab_size, getattr(saved, "padded_vocab_size", None)
    if theirs is not None and mine != theirs:
        raise ValueError(
            f"padded_vocab_size ({mine}) must be that of {source}, which is ({theirs}): the "
            "padding, by default to a multiple of --make-vocab-size-divisible-by times the "
            "tensor-parallel size, counts in the loss, and Megatron would fill or cut it. Add "
            f"--padded-vocab-size {theirs}."
        )


def _check_no_row_is_lost(args: Namespace, saved: Namespace, source: Source) -> None:
    mine, theirs = args.padded_vocab_size, known_size(saved)
    if theirs is not None and mine < theirs:
        raise ValueError(
            f"padded_vocab_size ({mine}) must be at least the vocabulary of {source}, which is "
            f"({theirs}): Megatron would cut off rows of its embedding. Add --padded-vocab-size "
            f"{getattr(saved, 'padded_vocab_size', theirs)}."
        )


def _check_parameter_groups(args: Namespace, saved: Namespace, source: Source) -> None:
    # Megatron finds saved groups by their learning rates and decay, and fails on every rank.
    architecture = find_architecture(args.architecture)
    for option, default in architecture.own_options.items():
        mine, theirs = getattr(args, option), getattr(saved, option, default)
        as_saved = Namespace(**vars(args) | {option: theirs})
        if architecture.parameter_groups(args) != architecture.parameter_groups(as_saved):
            raise ValueError(
                f"{option} ({mine}) must be that of {source}, which is ({theirs}): it says how the "
                "optimizer whose state is in it treats parameters. Give it on the command line, or "
                "start with fresh moments (--no-load-optim)."
            )


def _check_optimizer(args: Namespace, saved: Namespace, source: Source) -> None:
    distributed = getattr(saved, "use_distributed_optimizer", False)
    if args.use_distributed_optimizer != distributed:
        raise ValueError(
            f"use_distributed_optimizer ({args.use_distributed_optimizer}) must be that of "
            f"{source}, which is ({distributed}): the two save their state differently. Change "
            "--use-distributed-optimizer, or start with fresh moments (--no-load-optim)."
        )
    _check_parameter_groups(args, saved, source)
    mine, theirs = (getattr(a, "expert_model_parallel_size", 1) for a in (args, saved))
    if (mine > 1) != (theirs > 1):
        raise ValueError(
            f"expert_model_parallel_size ({mine}) must be that of {source}, which is ({theirs}): "
            "Megatron 0.19.2 groups the optimizer's state differently with experts spread over "
            "ranks. Keep it, or start with fresh moments (--no-load-optim)."
        )
    if not distributed or getattr(saved, "dist_ckpt_optim_fully_reshardable", False):
        return
    for option in LAYOUT:
        mine, theirs = getattr(args, option) or 1, getattr(saved, option, None) or 1
        if mine != theirs:
            raise ValueError(
                f"{option} ({mine}) must be that of {source}, which is ({theirs}): its optimizer "
                "state was saved without --dist-ckpt-optim-fully-reshardable and fits that layout "
                "alone. Resume there and save once with the flag, or start with fresh moments "
                "(--no-load-optim)."
            )
