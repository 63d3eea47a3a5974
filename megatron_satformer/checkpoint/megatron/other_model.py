"""What of a checkpoint does not fit the model and the optimizer that a run asks for.

Every function yields the rows of its part, each with its refusal. Must not know: modules, process
groups.
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_satformer.checkpoint.megatron.changes import Change
from megatron_satformer.checkpoint.megatron.source import Source
from megatron_satformer.checkpoint.megatron.vocabulary import known_size
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
# What says which parameters a rank has, and what it is where it was not given.
ON_A_RANK = dict.fromkeys(LAYOUT, 1) | {"v1_transport": "carry"}
PRECISION = ("bf16", "fp16")
START = "Give its folder as --pretrained-checkpoint, which is read until --load holds a checkpoint."


def refuse(option: str, then: Any, now: Any, told: str) -> Change:
    """A row that is refused: the option with its value "must be", and then what is told."""
    return Change(option, then, now, refusal=ValueError(f"{option} ({now}) must be {told}"))


def find_other_transformer(args: Namespace, saved: Namespace, source: Source) -> Iterator[Change]:
    """Where the weights of a plain Transformer are to be read (--from-transformer)."""
    theirs = getattr(saved, "architecture", PLAIN)
    if theirs != PLAIN:
        told = (
            f"given with a Transformer's checkpoint, and {source} is that of architecture "
            f"({theirs}). Leave --from-transformer out."
        )
        yield refuse("from_transformer", theirs, True, told)
        return
    yield from _find_other_options(args, saved, source, TRANSFORMER_OPTIONS)


def _find_other_options(
    args: Namespace, saved: Namespace, source: Source, options: Mapping[str, str]
) -> Iterator[Change]:
    compared: dict[str, tuple[Any, Any]] = {
        option: (getattr(args, option), getattr(saved, option, getattr(saved, older, None)))
        for option, older in options.items()
    }
    compared["num_query_groups"] = _query_groups(args), _query_groups(saved)
    if args.position_embedding_type == "learned_absolute":
        positions = "max_position_embeddings"
        compared[positions] = getattr(args, positions), getattr(saved, positions, None)
    for option, (mine, theirs) in compared.items():
        if theirs is not None and mine != theirs:
            told = (
                f"that of {source}, which is ({theirs}), for the run to go on as that model. Give "
                "it on the command line."
            )
            yield refuse(option, theirs, mine, told)


def _query_groups(args: Namespace) -> int:
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads


def find_other_architecture(args: Namespace, saved: Namespace, source: Source) -> Iterator[Change]:
    """What makes another model of the run."""
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
        yield refuse(option, theirs, mine, f"that of {source}, which is ({theirs}). {way}")
    # A model is fine-tuned to longer texts with another base of its rotary embedding.
    free = {"rotary_base"} if source.weights_only else set()
    fixed = {option: older for option, older in TRANSFORMER_OPTIONS.items() if option not in free}
    yield from _find_other_options(args, saved, source, fixed)


def find_other_padding(args: Namespace, saved: Namespace, source: Source) -> Iterator[Change]:
    """A vocabulary that is padded otherwise."""
    mine, theirs = args.padded_vocab_size, getattr(saved, "padded_vocab_size", None)
    if theirs is not None and mine != theirs:
        told = (
            f"that of {source}, which is ({theirs}): the padding, by default to a multiple of "
            "--make-vocab-size-divisible-by times the tensor-parallel size, counts in the loss, "
            f"and Megatron would fill or cut it. Add --padded-vocab-size {theirs}."
        )
        yield refuse("padded_vocab_size", theirs, mine, told)


def find_lost_rows(args: Namespace, saved: Namespace, source: Source) -> Iterator[Change]:
    """A vocabulary that Megatron would cut."""
    mine, theirs = args.padded_vocab_size, known_size(saved)
    if theirs is not None and mine < theirs:
        told = (
            f"at least the vocabulary of {source}, which is ({theirs}): Megatron would cut off "
            "rows of its embedding. Add --padded-vocab-size "
            f"{getattr(saved, 'padded_vocab_size', theirs)}."
        )
        yield refuse("padded_vocab_size", theirs, mine, told)


def _find_other_groups(args: Namespace, saved: Namespace, source: Source) -> Iterator[Change]:
    # Megatron finds saved groups by their learning rates and decay, and fails on every rank.
    architecture = find_architecture(args.architecture)
    for option, default in architecture.own_options.items():
        mine, theirs = getattr(args, option), getattr(saved, option, default)
        as_saved = Namespace(**vars(args) | {option: theirs})
        if architecture.parameter_groups(args) != architecture.parameter_groups(as_saved):
            told = (
                f"that of {source}, which is ({theirs}): it says how the optimizer whose state is "
                "in it treats parameters. Give it on the command line, or start with fresh moments "
                "(--no-load-optim)."
            )
            yield refuse(option, theirs, mine, told)


def find_other_optimizer(args: Namespace, saved: Namespace, source: Source) -> Iterator[Change]:
    """What the optimizer's saved state does not fit."""
    mine, theirs = args.optimizer, getattr(saved, "optimizer", args.optimizer)
    if mine != theirs:
        told = (
            f"that of {source}, which is ({theirs}), whose state is in it. Give it on the command "
            "line, or start with fresh moments (--no-load-optim)."
        )
        yield refuse("optimizer", theirs, mine, told)
    for option in PRECISION:
        mine, theirs = getattr(args, option), getattr(saved, option, getattr(args, option))
        if mine != theirs:
            told = (
                f"that of {source}, which is ({theirs}): the optimizer's state is saved otherwise "
                f"in another precision. Change --{option}, or start with fresh moments "
                "(--no-load-optim)."
            )
            yield refuse(option, theirs, mine, told)
    distributed = getattr(saved, "use_distributed_optimizer", False)
    if args.use_distributed_optimizer != distributed:
        told = (
            f"that of {source}, which is ({distributed}): the two save their state differently. "
            "Change --use-distributed-optimizer, or start with fresh moments (--no-load-optim)."
        )
        yield refuse("use_distributed_optimizer", distributed, args.use_distributed_optimizer, told)
    yield from _find_other_groups(args, saved, source)
    mine, theirs = (getattr(a, "expert_model_parallel_size", 1) for a in (args, saved))
    if (mine > 1) != (theirs > 1):
        told = (
            f"that of {source}, which is ({theirs}): Megatron 0.19.2 groups the optimizer's state "
            "differently with experts spread over ranks. Keep it, or start with fresh moments "
            "(--no-load-optim)."
        )
        yield refuse("expert_model_parallel_size", theirs, mine, told)
    if not distributed or getattr(saved, "dist_ckpt_optim_fully_reshardable", False):
        return
    for option, default in ON_A_RANK.items():
        mine, theirs = (getattr(a, option, None) or default for a in (args, saved))
        if mine != theirs:
            told = (
                f"that of {source}, which is ({theirs}): its optimizer state was saved without "
                "--dist-ckpt-optim-fully-reshardable and fits that layout alone. Resume there and "
                "save once with the flag, or start with fresh moments (--no-load-optim)."
            )
            yield refuse(option, theirs, mine, told)
