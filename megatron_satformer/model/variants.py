"""What is compared: the architectures of the table, and the controls that their records declare."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_satformer.model.architectures import all_architectures


@dataclass(frozen=True)
class Variant:
    """An architecture with some of its own options.

    Attributes:
        name: in results and file names.
        architecture: of the table.
        options: its own options, where not the defaults.
    """

    name: str
    architecture: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def flags(self) -> list[str]:
        """As pretrain_satformer.py takes them."""
        words = ["--architecture", self.architecture]
        for option, value in self.options.items():
            flag = option.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", str(value)]
        return words


def find_variants(
    names: Sequence[str] | None = None, option: str = "architectures"
) -> list[Variant]:
    """The variants of these names, or every architecture without its controls.

    Args:
        names: architectures, or controls as records name them.
        option: what gave them, for errors.

    Raises:
        ValueError: there is none of a name, or a name is there twice.
    """
    if names is None:
        return [Variant(a.name, a.name) for a in all_architectures()]
    known = all_variants()
    for name in names:
        if name not in known:
            raise ValueError(f"{option} ({name}) must be of {', '.join(known)}.")
        if list(names).count(name) > 1:
            raise ValueError(f"{option} ({name}) must be named once. Leave the other out.")
    return [known[name] for name in names]


def all_variants() -> dict[str, Variant]:
    """Every architecture, each followed by its controls, by name."""
    found = {}
    for architecture in all_architectures():
        found[architecture.name] = Variant(architecture.name, architecture.name)
        for name, options in architecture.controls.items():
            found[name] = Variant(name, architecture.name, options)
    return found
