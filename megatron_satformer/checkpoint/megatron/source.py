"""Which checkpoint Megatron is about to read.

As Megatron (0.19.2) chooses it in load_checkpoint. Must not know: what is in it.
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from megatron_satformer.checkpoint.megatron.reader import TRACKER


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
