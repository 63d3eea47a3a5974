"""The end of a run: indexes, the manifest, and all files under their final names."""

import hashlib
import os
from pathlib import Path
from typing import Any

from megatron_satformer.data.datasets.indexed import index_blocks
from megatron_satformer.data.datasets.manifest import (
    FORMAT,
    SUFFIX,
    VERSION,
    Checksum,
    describe_dataset,
    forget_dataset,
    manifest_path,
    write_manifest,
)
from megatron_satformer.data.preprocess.run_folder import RunFolder, Spool

REJECTS = ".rejects.jsonl"


def publish_run(folder: RunFolder, summary: dict[str, Any]) -> None:
    """Completes the files of a run, whose data sets are open, and gives them their final names.

    Args:
        folder: The run's.
        summary: Counts for the manifest.
    """
    spools, prefix = folder.spools, os.fspath(folder.options.output_prefix)
    parent = Path(prefix).parent
    finals: dict[str, str] = {}
    datasets = {}
    for spool in spools:
        spool.sync()
        index = folder.path / f"{spool.name}.idx"
        datasets[spool.name] = {
            **describe_dataset(
                spool.documents,
                spool.tokens,
                spool.dtype.name,
                [Checksum(spool.tokens * spool.dtype.itemsize, spool.sha256.hexdigest())],
                _write_index(index, spool),
            ),
            "empty_documents": spool.empty,
            "largest_token": spool.largest,
        }
        finals[spool.bin.name] = os.fspath(parent / spool.bin.name)
    for spool in spools:
        finals[f"{spool.name}.idx"] = os.fspath(parent / f"{spool.name}.idx")
    rejects = Path(f"{prefix}{REJECTS}")
    if summary["rejected_documents"]:
        finals["rejects.jsonl"] = os.fspath(rejects)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "summary": summary,
        "asked": folder.state["asked"],
        "datasets": datasets,
    }
    write_manifest(folder.path / f"data{SUFFIX}", manifest)
    finals[f"data{SUFFIX}"] = os.fspath(manifest_path(prefix))
    for spool in spools:
        # Another manifest may describe what stood there before.
        forget_dataset(parent / spool.name)
    folder.publish(summary, finals)
    if not summary["rejected_documents"]:
        # Of a run that this one replaces.
        rejects.unlink(missing_ok=True)


def _write_index(path: Path, spool: Spool) -> Checksum:
    """Writes the index of a data set."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for block in index_blocks(spool.dtype, spool.open_lengths()):
            file.write(block)
            digest.update(block)
            size += len(block)
    return Checksum(size, digest.hexdigest())
