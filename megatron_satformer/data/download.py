"""Documents of a Hugging Face dataset to JSON lines: streamed, up to a budget, resumable.

    OUTPUT/part-00000.jsonl    {"text": ...}, a shard of about so many bytes; the next one, ...
    OUTPUT/state.json          what was asked, and where the next shard begins in the stream

A shard gets its name once it is whole, and then the state is written: a kill costs the shard that
was being written, and the same command makes the same bytes.
"""

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from megatron_satformer.files.atomic import AtomicFile, write_atomically
from megatron_satformer.files.locks import open_locked

STATE = "state.json"
FORMAT = "megatron-satformer download"
_SHARD = re.compile(r"part-\d{5}\.jsonl")


@dataclass(frozen=True)
class DownloadOptions:
    """What to download; the field names are the flags of tools/download_dataset.py.

    Attributes:
        dataset: Name on the Hugging Face hub, or a folder of JSON lines or Parquet files.
        output: Folder to make.
        name: Configuration of the dataset, such as sample-10BT.
        split: Of the dataset.
        revision: Commit, tag or branch on the hub; the newest commit if left out. It is looked up
            once: a download that goes on stays with the same commit.
        text_column: Column whose text is kept.
        token_column: Column with the number of tokens of a document, which the budget counts.
        bytes_per_token: Count a token for so many bytes of text, in place of a column.
        tokens: Budget; the last document is the first that reaches it. All documents if left out.
        shard_bytes: Bytes of JSON lines after which a new file begins.
        overwrite: Start over.

    Raises:
        ValueError: If an option has a value it cannot have.
    """

    dataset: str
    output: str | os.PathLike[str]
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str = "text"
    token_column: str = "token_count"
    bytes_per_token: float | None = None
    tokens: int | None = None
    shard_bytes: int = 256_000_000
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "bytes_per_token", "shard_bytes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} ({value}) must be more than 0.")

    @property
    def is_local(self) -> bool:
        """Whether the dataset is a folder here."""
        return os.path.isdir(self.dataset)


@dataclass(frozen=True)
class DownloadSummary:
    """What is there now.

    Attributes:
        documents: In all shards.
        tokens: By the column, or by bytes; 0 where no budget was given.
        bytes: Of all shards.
        exhausted: Whether these are all documents of the dataset.
        shards: Files.
        resumed: Documents of them that runs before this one had downloaded.
        seconds: Of this run.
    """

    documents: int
    tokens: int
    bytes: int
    exhausted: bool
    shards: int
    resumed: int
    seconds: float


def download(options: DownloadOptions) -> DownloadSummary:
    """Downloads a dataset, or goes on where a run before was stopped.

    A budget that was raised goes on too, behind the last document.

    Raises:
        ValueError: If the dataset or a column is not there, or the folder holds something else.
    """
    start = time.perf_counter()
    datasets = _import_datasets()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"output ({folder}) is being written by another process. Wait for it."
    lock = open_locked(folder, os.O_RDONLY, busy=busy)
    try:
        state = _take_up(folder, options)
        resumed = state["documents"]
        if not _is_enough(state, options):
            _write_shards(folder, options, state, _open_stream(datasets, options, state))
    finally:
        os.close(lock)
    counts = {key: state[key] for key in ("documents", "tokens", "bytes", "exhausted")}
    seconds = time.perf_counter() - start
    return DownloadSummary(**counts, shards=len(state["shards"]), resumed=resumed, seconds=seconds)


def _import_datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"dataset needs the package datasets, which cannot be imported ({error}). Install it: "
            "pip install -c constraints.txt -e '.[download]'"
        ) from None
    datasets.disable_progress_bars()
    return datasets


def _describe(options: DownloadOptions) -> dict[str, Any]:
    """What must be the same when a download goes on."""
    names = ("dataset", "name", "split", "text_column", "shard_bytes")
    asked = {name: getattr(options, name) for name in names}
    counted = options.bytes_per_token or options.token_column
    asked["counted_by"] = None if options.tokens is None else counted
    return asked | ({"dataset": os.path.abspath(options.dataset)} if options.is_local else {})


def _take_up(folder: Path, options: DownloadOptions) -> dict[str, Any]:
    """Returns the state of the download that is there, or of a new one.

    Raises:
        ValueError: If it is another download, damaged, or files of it are gone.
    """
    asked = _describe(options)
    names = sorted(path.name for path in folder.iterdir() if not path.name.endswith(".partial"))
    way_out = "Choose another --output, or pass --overwrite to start over."
    state: dict[str, Any] = {}
    if STATE in names:
        with contextlib.suppress(ValueError):
            state = json.loads((folder / STATE).read_text())
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"output ({folder / STATE}) must be of a download. {way_out}")
    elif names and not all(map(_SHARD.fullmatch, names)):
        raise ValueError(
            f"output ({folder}) must be empty, or hold a download, but has {names[0]}. Choose "
            "another --output."
        )
    if options.overwrite or not state:
        for name in names:
            (folder / name).unlink()
        counts = {"documents": 0, "tokens": 0, "bytes": 0, "exhausted": False}
        state = {"format": FORMAT, "asked": asked, "revision": _commit_of(options)}
        state |= {**counts, "shards": [], "position": None}
        state["asked"]["revision"] = options.revision
        write_atomically(folder / STATE, json.dumps(state).encode())
        return state
    for key, value in asked.items():
        if value != state["asked"].get(key):
            then = state["asked"].get(key)
            raise ValueError(f"{key} ({value}) was {then} when this download began. {way_out}")
    if options.revision not in (None, state["revision"], state["asked"].get("revision")):
        raise ValueError(
            f"revision ({options.revision}) was {state['revision']} when this download began. "
            f"{way_out}"
        )
    for shard in state["shards"]:
        path = folder / shard["name"]
        size = path.stat().st_size if path.is_file() else 0
        if size != shard["bytes"]:
            raise ValueError(
                f"output ({path}) must have {shard['bytes']} bytes, but has {size}. {way_out}"
            )
    return state


def _is_enough(state: dict[str, Any], options: DownloadOptions) -> bool:
    reached = options.tokens is not None and state["tokens"] >= options.tokens
    return state["exhausted"] or reached


def _commit_of(options: DownloadOptions) -> str | None:
    """The commit that a name on the hub means now; None of a folder."""
    if options.is_local:
        return None
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(options.dataset, revision=options.revision).sha
    except (OSError, ValueError) as error:
        raise ValueError(
            f"dataset ({options.dataset}) must be a folder here, or a dataset on the hub that can "
            f"be reached: {error}"
        ) from None


def _open_stream(datasets: ModuleType, options: DownloadOptions, state: dict[str, Any]) -> Any:
    try:
        stream = datasets.load_dataset(
            options.dataset,
            options.name,
            split=options.split,
            revision=state["revision"],
            streaming=True,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"dataset ({options.dataset}) cannot be opened: {error}") from None
    if state["position"] is not None:
        stream.load_state_dict(state["position"])
    return stream


def _write_shards(
    folder: Path, options: DownloadOptions, state: dict[str, Any], stream: Any
) -> None:
    rows = _rows(stream, options, state)
    total = options.tokens
    unit = "doc" if total is None else "tok"
    done = state["documents"] if total is None else state["tokens"]
    with tqdm(
        total=total, initial=done, unit=unit, unit_scale=True, desc="downloading", disable=None
    ) as progress:
        while not _is_enough(state, options):
            name = f"part-{len(state['shards']):05d}.jsonl"
            shard: dict[str, Any] = {"name": name, "bytes": 0, "documents": 0, "tokens": 0}
            with AtomicFile(folder / name) as output:
                enough = False
                for text, tokens in rows:
                    line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
                    shard["bytes"] += output.file.write(line.encode("utf-8", "surrogatepass"))
                    shard["documents"] += 1
                    shard["tokens"] += tokens
                    progress.update(1 if total is None else tokens)
                    enough = total is not None and state["tokens"] + shard["tokens"] >= total
                    if enough or shard["bytes"] >= options.shard_bytes:
                        break
                else:
                    state["exhausted"] = True
                if not shard["documents"]:
                    output.discard()
            if shard["documents"]:
                state["shards"].append(shard)
            for key in ("documents", "tokens", "bytes"):
                state[key] += shard[key]
            state["position"] = stream.state_dict()
            write_atomically(folder / STATE, json.dumps(state).encode())


def _rows(
    stream: Any, options: DownloadOptions, state: dict[str, Any]
) -> Iterator[tuple[str, int]]:
    """Yields the text of each document from the position of the stream on, and its tokens.

    Raises:
        ValueError: If a column is missing or of another kind, or the stream breaks off.
    """
    rows, number = iter(stream), state["documents"]
    kept = "What was written is kept; run the same command to go on."
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # of whatever reads: network, decompression, Parquet
            place = f"dataset ({options.dataset}) breaks off behind document {number}"
            raise ValueError(f"{place}: {type(error).__name__}: {error}. {kept}") from error
        if row is None:
            return
        number += 1
        text = _column(row, options, "text_column", str, number)
        tokens = 0
        if options.tokens is not None and options.bytes_per_token is None:
            tokens = _column(row, options, "token_column", int, number)
        elif options.bytes_per_token is not None:
            tokens = math.ceil(len(text.encode("utf-8", "surrogatepass")) / options.bytes_per_token)
        yield text, tokens


def _column(row: dict[str, Any], options: DownloadOptions, option: str, kind: type, n: int) -> Any:
    name = getattr(options, option)
    if name not in row:
        more = ", or give --bytes-per-token" if option == "token_column" else ""
        raise ValueError(
            f"{option} ({name}) must be a column of {options.dataset}: it has "
            f"{', '.join(sorted(row))}. Name another{more}."
        )
    if not isinstance(row[name], kind):
        raise ValueError(
            f"{option} ({name}) must hold {'text' if kind is str else 'whole numbers'}, but in "
            f"document {n} it is {type(row[name]).__name__}. Name another."
        )
    return row[name]
