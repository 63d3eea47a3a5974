"""Whether every byte that a `torch_dist` checkpoint's own list speaks of is there.

No weight is read: lengths of files alone are looked at.
"""

from collections.abc import Callable
from pathlib import Path

from torch.distributed.checkpoint import Metadata, TensorStorageMetadata


def find_damage(
    folder: Path, metadata: Metadata, wanted: Callable[[str], bool] = lambda key: True
) -> list[str]:
    """Lists the files that are missing or cut short, and the tensors that no file holds.

    Args:
        folder: Of one step.
        metadata: Read from it: where every piece lies.
        wanted: Whether a key counts; a file is looked at where it holds a piece of such a key.

    Returns:
        One phrase for each, without a full stop; empty if all is there.
    """
    if not metadata.storage_data:
        return [f"{folder / '.metadata'} lists no pieces"]
    ends: dict[str, tuple[int, str]] = {}  # file -> end of its last piece, and whose that is
    for where, piece in metadata.storage_data.items():
        if wanted(where.fqn):
            last = piece.offset + piece.length, where.fqn
            ends[piece.relative_path] = max(last, ends.get(piece.relative_path, last))
    problems = []
    for name, (end, key) in sorted(ends.items()):
        file = folder / name
        if not file.is_file():
            problems.append(f"{file} is missing: it holds part of {key}")
        elif (size := file.stat().st_size) < end:
            problems.append(f"{file} is cut short: {size} bytes, and part of {key} ends at {end}")
    stored = metadata.state_dict_metadata.items()
    return problems + [
        f"{key} has no pieces"
        for key, tensor in stored
        if wanted(key) and isinstance(tensor, TensorStorageMetadata) and not tensor.chunks
    ]
