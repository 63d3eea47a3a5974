"""CRC-32 of every piece of a checkpoint, compared before it is read; `recording` has taken them.

That of a piece lies beside its place in the step's `.metadata`, where torch and Megatron pass over
it; those of the two small files that say what lies where lie in `checksums.json`. What an earlier
version saved, or a writer that is not Megatron's own (`--async-strategy nvrx`), has none and
passes. Must not know: Megatron, which step to use.
"""

import json
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import MetadataIndex

CHECKSUMS = "checksums.json"
LISTS = (".metadata", "metadata.json")
CHUNK = 1 << 24  # bytes read at once
READERS = 4  # threads; zlib lets go of the interpreter


def find_changed_lists(folder: Path) -> list[str]:
    """The files of a step, of those that say what lies where, that are not as they were written.

    Args:
        folder: Of one step.

    Returns:
        One phrase for each, without a full stop.
    """
    try:
        sums = json.loads((folder / CHECKSUMS).read_bytes())["crc32"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{folder / CHECKSUMS} cannot be read"]
    changed = (name for name in LISTS if sum_bytes(folder / name) != sums.get(name))
    return [f"{folder / name} is not as it was written (its checksum differs)" for name in changed]


def find_changed_pieces(
    folder: Path, metadata: Metadata, wanted: Callable[[str], bool] = lambda key: True
) -> list[str]:
    """The files of a step that hold a piece that is not as it was written; reads all that is asked.

    Args:
        folder: Of one step; every file is there and long enough.
        metadata: Read from it.
        wanted: Whether a key counts.

    Returns:
        One phrase for each, without a full stop.
    """
    pieces = [
        (where, place)
        for where, place in metadata.storage_data.items()
        if wanted(where.fqn) and hasattr(place, "crc32")
    ]
    pieces.sort(key=lambda piece: (piece[1].relative_path, piece[1].offset))
    changed: dict[str, str] = {}
    with ThreadPoolExecutor(READERS) as readers:
        checked = readers.map(partial(_is_as_written, folder), pieces)
        for (where, place), same in zip(pieces, checked, strict=True):
            if not same:
                changed.setdefault(place.relative_path, where.fqn)
    return [
        f"{folder / name} is not as it was written (the checksum of {key} differs)"
        for name, key in changed.items()
    ]


def _is_as_written(folder: Path, piece: tuple[MetadataIndex, Any]) -> bool:
    place = piece[1]
    return sum_bytes(folder / place.relative_path, place.offset, place.length) == place.crc32


def sum_bytes(path: Path, offset: int = 0, length: int | None = None) -> int:
    """CRC-32 of a file, or of a part of it.

    Args:
        path: The file.
        offset: Where the part begins.
        length: Its bytes; None for the rest.
    """
    left = path.stat().st_size if length is None else length
    crc32 = 0
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while left and (content := file.read(min(left, CHUNK))):
            crc32 = zlib.crc32(content, crc32)
            left -= len(content)
    return crc32
