"""Parts of one data set, made by runs of their own: their names, and whether all are there.

    PREFIX.parts/part-03-of-16_KEY_document.bin     with .idx and the manifest of the run

The manifest says what a run was asked, and which part of how many it made.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_satformer.data.datasets.manifest import find_manifest, read_manifest

_NAME = re.compile(r"part-\d+-of-(\d+)(?=[._])")
# What runs of one data set may have been asked differently, since it does not change their tokens.
_OWN = ("part", "on_error", "on_unknown")


def part_prefix(output_prefix: str | os.PathLike[str], num_parts: int, part: int) -> str:
    """Returns the prefix of one part; sorted by name the parts are in order."""
    digits = len(str(num_parts - 1))
    name = f"part-{part:0{digits}}-of-{num_parts}"
    return os.path.join(f"{os.fspath(output_prefix)}.parts", name)


def check_other_parts(output_prefix: str | os.PathLike[str], num_parts: int) -> None:
    """Refuses to make a part beside parts of another number.

    Raises:
        ValueError: Naming the number.
    """
    folder = Path(f"{os.fspath(output_prefix)}.parts")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = _NAME.match(path.name)
        if found and int(found[1]) != num_parts:
            raise ValueError(
                f"num_parts ({num_parts}) must be {found[1]}, as of {path}. Use that, or remove "
                f"{folder} to start over."
            )


def check_all_parts(prefixes: Sequence[str]) -> None:
    """Refuses to merge some parts of a data set, parts of several, or parts out of order.

    Args:
        prefixes: What is to be merged, in order; nothing is said of those without a manifest.

    Raises:
        ValueError: Naming the part that is missing or does not belong there.
    """
    runs = {prefix: asked for prefix in prefixes if (asked := _asked(prefix)) is not None}
    if not runs:
        return
    first, asked = next(iter(runs.items()))
    for prefix in prefixes:
        if prefix not in runs:
            raise ValueError(
                f"input ({prefix}) must be a part of the same data set as {first}. Merge the parts "
                "first, then the result with others."
            )
        for key in asked.keys() | runs[prefix].keys():
            if key not in _OWN and asked.get(key) != runs[prefix].get(key):
                raise ValueError(
                    f"input ({prefix}) must be a part of the same run as {first}, but was asked "
                    f"for another {key}. Make it again as the others were."
                )
    found = [run["part"] for run in runs.values()]
    number = asked["num_parts"]
    missing = sorted(set(range(number)) - set(found))
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise ValueError(
            f"input ({os.path.dirname(first)}) must hold all {number} parts, but lacks {shown}. "
            "Make them with tools/preprocess_data.py --part, then merge."
        )
    if found != list(range(number)):
        raise ValueError(
            f"input must name the parts in order, but has {', '.join(map(str, found[:10]))}. Name "
            "their folder in their place."
        )


def _asked(prefix: str) -> dict[str, Any] | None:
    """What the run that made a part was asked; None of what is no part."""
    path = find_manifest(prefix)
    asked = read_manifest(path).get("asked") if path is not None else None
    return asked if isinstance(asked, dict) and asked.get("num_parts") is not None else None
