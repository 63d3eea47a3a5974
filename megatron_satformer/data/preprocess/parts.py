"""A run that makes one part of a data set: what it reads, and whether it is done already."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_satformer.data.datasets.indexed import IndexedFile
from megatron_satformer.data.datasets.manifest import manifest_path, read_manifest
from megatron_satformer.data.datasets.parts import check_other_parts
from megatron_satformer.data.datasets.verify import verify_dataset
from megatron_satformer.data.preprocess.options import PreprocessOptions
from megatron_satformer.data.preprocess.run_identity import check_same_run, describe_run
from megatron_satformer.data.reading.inputs import Source
from megatron_satformer.data.reading.pieces import Piece, cut_part, whole_pieces


def pieces_of(options: PreprocessOptions, sources: Sequence[Source]) -> list[Piece]:
    """Returns what a run reads of the inputs: a part, or all of them.

    Raises:
        ValueError: If there are more parts than the inputs can be cut into, or parts of another
            number beside.
    """
    if options.num_parts is None or options.part is None:
        return whole_pieces(sources)
    check_other_parts(options.output_prefix, options.num_parts)
    return cut_part(sources, options.chunk_bytes, options.num_parts, options.part)


def finished_part(options: PreprocessOptions, sources: Sequence[Source]) -> dict[str, Any] | None:
    """Returns the summary of a part that is complete, read again from end to end.

    Returns:
        None of a part that is not, of one that is to be overwritten, and of a run of all parts.

    Raises:
        ValueError: If it is damaged, or was asked something else.
    """
    path, unfinished = manifest_path(options.own_prefix), Path(f"{options.own_prefix}.partial")
    if options.part is None or options.overwrite or unfinished.exists() or not path.exists():
        return None
    manifest = read_manifest(path)
    check_same_run(manifest["asked"], describe_run(options, sources), path)
    verify_part(options)
    return dict(manifest["summary"])


def verify_part(options: PreprocessOptions) -> None:
    """Reads a part's data set again, and compares it with its manifest.

    Raises:
        ValueError: If it is damaged.
    """
    for prefix in options.prefixes:
        verify_dataset(IndexedFile(prefix))
