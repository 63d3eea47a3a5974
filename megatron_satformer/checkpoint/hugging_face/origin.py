"""What a Hugging Face folder says that Megatron has no option for; it travels in the checkpoint.

from-hf puts it into the args that every checkpoint holds, training hands it on, to-hf gives it
back. What Megatron has an option for is not in it: there training has the last word. Must not know:
weights.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_satformer.checkpoint.hugging_face.folder import GENERATION_CONFIG, HFFolder
from megatron_satformer.checkpoint.hugging_face.plain_classes import IDS, SHAPE_FIELDS
from megatron_satformer.checkpoint.hugging_face.weights import read_json
from megatron_satformer.model.architectures import all_architectures

ARGUMENT = "hugging_face_origin"
# What an export writes anew: of Megatron's options, of the class that computes it, of transformers.
_WRITTEN = frozenset(
    {
        *SHAPE_FIELDS,
        *("hidden_act", "qk_norm", "qk_norm_eps", "architecture", "rope_parameters", "rope_theta"),
        *("model_type", "architectures", "auto_map", "dtype", "transformers_version"),
    }
)
# Written where the class has the field, and else carried: Mistral's has neither.
_BIASES = ("attention_bias", "mlp_bias")


@dataclass(frozen=True)
class Origin:
    """What travels.

    Attributes:
        model_type: Of the folder's class.
        config: Fields of its config.json; the ids of bos, eos and pad as its class reads them.
        generation: Its generation_config.json, if there is one.
        vocab_size: Rows of its embedding.
        tokenizer: Entries of its tokenizer, and that one's ids of bos, eos and pad; empty if it
            has none.
    """

    model_type: str
    config: dict[str, Any]
    generation: dict[str, Any] | None
    vocab_size: int
    tokenizer: tuple[int | None, ...] = ()
    left: tuple[str, ...] = field(default=(), compare=False)  # names of what does not travel

    def __str__(self) -> str:
        told = {"config.json": self.config, GENERATION_CONFIG: self.generation or {}}
        carried = [
            f"{', '.join(sorted(names - set(_BIASES)))} of {file}"
            for file, names in ((file, content.keys()) for file, content in told.items())
            if names
        ]
        lines = [
            f"NOTE: no option of Megatron's says {' and '.join(carried)}: it travels in the "
            "checkpoint, and to-hf gives it back."
        ]
        if self.left:
            lines.append(
                f"NOTE: {', '.join(self.left)} does not travel: transformers' own record of one "
                "machine and version."
            )
        return "\n".join(lines)

    def put_into(self, args: Namespace) -> None:
        """As plain data, which any version of this project reads."""
        values = asdict(self)
        del values["left"]
        setattr(args, ARGUMENT, values)

    def has_tokenizer(self, tokens: Any) -> bool:
        """Whether an export's tokenizer, or none, leaves the folder's special ids what they are.

        Args:
            tokens: The tokenizer of transformers, or None.
        """
        if tokens is None:
            return True
        if self.tokenizer:
            return self.tokenizer == describe_tokenizer(tokens)
        ends = self.config.get("eos_token_id")
        return tokens.eos_token_id in (ends if isinstance(ends, list) else [ends])

    def complete(self, content: Mapping[str, Any], with_ids: bool) -> dict[str, Any]:
        """Adds to an export's config.json what the folder said.

        Args:
            content: Of the export's, as its class writes it.
            with_ids: Whether the ids of bos, eos and pad are the folder's, too.
        """
        anew = {*_written_names(), *_BIASES, *(() if with_ids else IDS)}
        whole = {**content, **self.config, **{n: v for n, v in content.items() if n in anew}}
        if "torch_dtype" in self.config:  # the older name of dtype, which --dtype may have changed
            whole["torch_dtype"] = content["dtype"]
        return whole


def read_origin(folder: HFFolder, theirs: Any, tokens: Any) -> Origin:
    """Sorts what the folder says.

    Args:
        folder: Opened.
        theirs: Its configuration, in its own class.
        tokens: Its tokenizer, of transformers, or None.

    Raises:
        ValueError: If generation_config.json cannot be read.
    """
    file = folder.path / GENERATION_CONFIG
    generation = read_json(file) if file.is_file() else None
    written = _written_names()
    if folder.config.get("rope_scaling"):  # of type default: rope_parameters says the same
        written |= {"rope_scaling"}
    left = [name for name in [*folder.config, *(generation or {})] if name.startswith("_")]
    return Origin(
        model_type=theirs.model_type,
        config={
            **{name: value for name, value in _public(folder.config) if name not in written},
            **{name: getattr(theirs, name) for name in IDS},
        },
        generation=None if generation is None else dict(_public(generation)),
        vocab_size=theirs.vocab_size,
        tokenizer=() if tokens is None else describe_tokenizer(tokens),
        left=tuple(dict.fromkeys(left)),
    )


def _written_names() -> frozenset[str]:
    return _WRITTEN.union(*(a.own_options for a in all_architectures()))


def _public(content: Mapping[str, Any]) -> list[tuple[str, Any]]:
    kept = content.items()
    return [(n, v) for n, v in kept if not n.startswith("_") and n != "transformers_version"]


def find_origin(args: Namespace) -> Origin | None:
    """What a checkpoint's args say of the folder that it began as, if it began as one."""
    values = getattr(args, ARGUMENT, None)
    return None if values is None else Origin(**values | {"tokenizer": tuple(values["tokenizer"])})


def describe_tokenizer(tokens: Any) -> tuple[int | None, ...]:
    """Number of entries, and the ids of bos, eos and pad."""
    return (len(tokens), *(getattr(tokens, name) for name in IDS))
