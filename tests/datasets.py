"""Small data sets for tests, written in one go."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_satformer.data.datasets.indexed import bin_path, idx_path, index_blocks, token_dtype


def write_dataset(
    prefix: Path, tokens: npt.ArrayLike, lengths: npt.ArrayLike, vocab_size: int = 100
) -> str:
    """Writes documents of one sequence each, in new files, and returns the prefix."""
    dtype = token_dtype(vocab_size)
    ids, counts = np.asarray(tokens), np.asarray(lengths, dtype=np.int32)
    assert ids.size == counts.sum()
    assert not ids.size or 0 <= ids.min() <= ids.max() < vocab_size
    index = b"".join(index_blocks(dtype, counts))
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for path, content in (
        (bin_path(prefix), ids.astype(dtype).tobytes()),
        (idx_path(prefix), index),
    ):
        # What is mapped of an old file stays as it is.
        path.unlink(missing_ok=True)
        path.write_bytes(content)
    return str(prefix)
