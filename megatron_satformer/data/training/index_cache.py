"""Megatron's sample indices on disk: whole, undamaged, and made for these very data.

Megatron (0.19.2) saves the document, sample and shuffle index of a data set in place, under a name
that is a hash of options, and later trusts whatever has that name: what a kill left half written,
what another launch is writing now, flipped bits, and indices of data made again since under the
same prefix. Here one process looks at every set before anything opens it, against checksums kept
beside it, and builds what is missing or wrong in a folder of its own; the files are then renamed
into place, each one whole. Launches that build a set at the same time write the same bytes, so that
none waits, and there is no lock to be left behind.

Megatron's data sets come in as objects and are handled by their attributes; nothing of Megatron is
imported.
"""

import contextlib
import copy
import dataclasses
import json
import logging
import os
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from megatron_satformer.data.datasets.indexed import idx_path
from megatron_satformer.files.locks import try_lock

# Of the two kinds of Megatron's data sets: what saves their index, and the arrays it saves.
KINDS = {
    "_build_document_sample_shuffle_indices": ("document_index", "sample_index", "shuffle_index"),
    "_build_indices": ("dataset_index", "dataset_sample_index"),
}
DESCRIPTION, CHECKSUMS = "description.txt", "checksums.json"
BLOCK = 1 << 24  # bytes
BUILDING = ".building-"
YOUNG, OLD = 60.0, 86400.0  # seconds


@contextlib.contextmanager
def muted_logging() -> Iterator[None]:
    """Without the information that Megatron logs, and logs again when training opens the data."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def plan_config(config: Any) -> Any:
    """Returns a data set config with which Megatron's builder names every index and opens none.

    Args:
        config: Megatron's GPTDatasetConfig.
    """
    folder = config.path_to_cache or ""
    return dataclasses.replace(
        config, defer_npy_index_mmap=True, fast_cache_load=False, path_to_cache=folder
    )


@dataclass(frozen=True)
class IndexSet:
    """The files of one index.

    Attributes:
        base: Their path without the endings.
        endings: Of the files that Megatron reads, such as "sample_index.npy".
        data: The `.idx` file that the index depends on, or None.
        build: Makes the files in a folder.
    """

    base: Path
    endings: tuple[str, ...]
    data: Path | None
    build: Callable[[Path], None]

    def path(self, ending: str, folder: Path | None = None) -> Path:
        """Returns the path of one file, in another folder if one is given."""
        return (folder or self.base.parent) / f"{self.base.name}-{ending}"


def find_index_sets(datasets: Any, cache_folder: str | None) -> list[IndexSet]:
    """Returns every index that Megatron will read for these data sets.

    Args:
        datasets: What Megatron's builder returned for `plan_config`.
        cache_folder: --data-cache-path; None is a folder beside each data set, as in Megatron,
            which keeps no index of a blend then.
    """
    sets: dict[Path, IndexSet] = {}
    for dataset in _flatten(datasets):
        method = next(name for name in KINDS if hasattr(dataset, name))
        arrays = KINDS[method]
        low_level = getattr(dataset, "dataset", None)
        prefix = getattr(low_level, "path_prefix", None)
        if cache_folder is not None:
            folder = Path(cache_folder)
        elif prefix is not None:
            folder = Path(prefix, "cache", f"{type(dataset).__name__}_indices")
        else:
            continue
        name = Path(getattr(dataset, f"path_to_{arrays[0]}")).name
        base = folder / name.removesuffix(f"-{arrays[0]}.npy")
        endings = (DESCRIPTION, *(f"{array}.npy" for array in arrays))
        data = None if prefix is None else idx_path(prefix)
        sets[base] = IndexSet(base, endings, data, partial(_build, dataset, method))
    return list(sets.values())


def _flatten(datasets: Any) -> Iterator[Any]:
    if isinstance(datasets, list):
        for dataset in datasets:
            yield from _flatten(dataset)
    elif datasets is not None:
        yield from getattr(datasets, "datasets", ())
        yield datasets


def _build(dataset: Any, method: str, folder: Path) -> None:
    twin = copy.copy(dataset)
    twin.config = dataclasses.replace(
        dataset.config, path_to_cache=str(folder), defer_npy_index_mmap=False
    )
    getattr(twin, method)()


def prepare_index_sets(
    sets: list[IndexSet], threads: int = 1, tell: Callable[[str], None] = print
) -> int:
    """Builds every index that is missing, damaged, or of other data, and leaves the rest alone.

    A folder is written to only if something in it has to be built. Call it in one process per
    launch; any number of launches may do so at once.

    Args:
        sets: From `find_index_sets`.
        threads: Indices that are looked at, or built, at a time.
        tell: Prints a line.

    Returns:
        How many were built.

    Raises:
        ValueError: If a folder cannot be written to, or a blend asks more than its data hold.
    """
    threads = max(1, threads)
    checksum_of_data = cache(checksum_file)  # three splits share their .idx
    with ThreadPoolExecutor(threads) as pool:
        faults = list(pool.map(partial(find_fault, checksum_of=checksum_of_data), sets))
    wrong = [(one, fault) for one, fault in zip(sets, faults, strict=True) if fault is not None]
    for one, fault in wrong:
        if fault:
            tell(f"> cache: {one.base}-* is built again: {fault}")
    for folder in dict.fromkeys(one.base.parent for one, _ in wrong):
        here = [one for one, _ in wrong if one.base.parent == folder]
        try:
            # The pool ends first: nothing is written any more when the staging folder goes.
            with _staging(folder) as staging, ThreadPoolExecutor(threads) as pool:
                tell(f"> cache: building {len(here)} of {len(sets)} indices in {folder}")
                list(pool.map(lambda one, at=staging: one.build(at), here))
                for one in here:
                    _publish(one, staging, checksum_of_data)
        except OSError as error:
            raise ValueError(
                f"data_cache_path ({folder}) must be a folder that can be written to, for "
                f"{len(here)} of Megatron's indices: {error}. Give another --data-cache-path."
            ) from None
        except IndexError as error:
            raise ValueError(" ".join(str(error).split())) from None
    return len(wrong)


def find_fault(one: IndexSet, checksum_of: Callable[[Path], dict[str, object]]) -> str | None:
    """Returns what is wrong with an index: None for nothing, "" if there is none yet.

    Args:
        one: The index.
        checksum_of: Gives size and checksum of a `.idx` file.
    """
    if not any(one.path(ending).exists() for ending in (*one.endings, CHECKSUMS)):
        return ""
    try:
        known = json.loads(one.path(CHECKSUMS).read_bytes())
        data, files = known["data"], {ending: known["files"][ending] for ending in one.endings}
        sizes = {ending: files[ending]["bytes"] for ending in one.endings}
    except FileNotFoundError:
        return "no checksums (a launch that was killed, or another program)"
    except (ValueError, KeyError, TypeError):
        return "its checksums are damaged"
    except OSError as error:
        return f"its checksums cannot be read ({error})"
    if one.data is not None and data != checksum_of(one.data):
        return f"{one.data.name} is not the file it was made for"
    for ending, wanted in files.items():
        path = one.path(ending)
        try:
            if path.stat().st_size != sizes[ending]:
                return f"{ending} has {path.stat().st_size} bytes instead of {sizes[ending]}"
            if checksum_file(path) != wanted:
                return f"{ending} is damaged"
        except OSError as error:
            return f"{ending} cannot be read ({error})"
    return None


def checksum_file(path: Path) -> dict[str, object]:
    """Returns size and CRC-32 of a file, {"bytes": int, "crc32": hexadecimal}."""
    size, checksum = 0, 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return {"bytes": size, "crc32": f"{checksum:08x}"}


def _publish(
    one: IndexSet, staging: Path, checksum_of: Callable[[Path], dict[str, object]]
) -> None:
    data = None if one.data is None else checksum_of(one.data)
    files = {ending: checksum_file(one.path(ending, staging)) for ending in one.endings}
    record = json.dumps({"data": data, "files": files}, indent=1)
    one.path(CHECKSUMS, staging).write_text(record + "\n")
    # The checksums last: whatever a kill leaves does not agree with them, or is right.
    for ending in (*one.endings, CHECKSUMS):
        os.replace(one.path(ending, staging), one.path(ending))


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder of this process's own within `folder`, gone in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{BUILDING}*"):
        if _abandoned(old):
            shutil.rmtree(old, ignore_errors=True)
    own = folder / f"{BUILDING}{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    own.mkdir()
    try:
        with (own / "lock").open("wb") as lock:
            try_lock(lock.fileno())  # tells others that we live
            yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _abandoned(staging: Path) -> bool:
    """Whether the process that made a folder was killed."""
    try:
        age = time.time() - staging.stat().st_mtime
        if age < YOUNG:
            return False  # perhaps not locked yet
        with (staging / "lock").open("r+b") as lock:
            free = try_lock(lock.fileno())
        return age > OLD if free is None else free
    except FileNotFoundError:
        return staging.exists()
    except OSError:
        return age > OLD
