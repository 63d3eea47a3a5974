"""The table of architectures: name -> where its record is. One file each, imported when asked for.

Another package adds one by an entry point of the group `megatron_satformer.architectures`;
docs/adding_an_architecture.md shows how. Nothing else in this project names an architecture to
tell it from the others.
"""

import logging
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from pkgutil import resolve_name

# Megatron's imports make torch look for a CUDA compiler, and say so where one is without a GPU
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
with warnings.catch_warnings():
    # Megatron's optional parts that are not installed
    warnings.simplefilter("ignore")
    from megatron_satformer.model.architectures.record import Architecture

PLAIN = "transformer"
"""What checkpoints hold that name no architecture: Megatron-LM's, and imports start from it."""

_HERE = "megatron_satformer.model.architectures"
TABLE: dict[str, str] = {
    PLAIN: f"{_HERE}.transformer:TRANSFORMER",
    "resformer": f"{_HERE}.resformer:RESFORMER",
    "satformer": f"{_HERE}.satformer:SATFORMER",
    "denseformer": f"{_HERE}.denseformer:DENSEFORMER",
    "hyperconnections": f"{_HERE}.hyperconnections:HYPERCONNECTIONS",
    "lime": f"{_HERE}.lime:LIME",
    "depth_attention": f"{_HERE}.depth_attention:DEPTH_ATTENTION",
    "value_embeddings": f"{_HERE}.value_embeddings:VALUE_EMBEDDINGS",
    "muddformer": f"{_HERE}.muddformer:MUDDFORMER",
    "attnres": f"{_HERE}.attnres:ATTNRES",
    "mhc": f"{_HERE}.mhc:MHC",
}
for _point in entry_points(group="megatron_satformer.architectures"):
    if TABLE.setdefault(_point.name, _point.value) != _point.value:
        raise ImportError(
            f"architecture ({_point.name}) is {TABLE[_point.name]} and, by an entry point of "
            f"another package, {_point.value}. Rename the latter, or uninstall its package."
        )


@cache
def find_architecture(name: str) -> Architecture:
    """The record of an architecture.

    Args:
        name: one of `TABLE`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in TABLE:
        raise ValueError(
            f"architecture ({name}) must be one of {', '.join(TABLE)}. One of another package must "
            "be installed with it."
        )
    found = resolve_name(TABLE[name])
    assert isinstance(found, Architecture), TABLE[name]
    assert found.name == name, f"{TABLE[name]} calls itself {found.name}"
    return found


def all_architectures() -> Iterator[Architecture]:
    """The records of the table, in its order."""
    return map(find_architecture, TABLE)
