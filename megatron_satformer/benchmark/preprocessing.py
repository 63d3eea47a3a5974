"""Whole commands against each other, in turn: time, memory, and that they write the same bytes.

Baselines are Megatron-LM's own tools where a checkout is given, the tokenizer libraries alone on
text in memory, and `cp` and `sha256sum` for merging and verifying.
"""

import filecmp
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import batched, islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import psutil

from megatron_satformer.data.datasets.indexed import bin_path, idx_path
from megatron_satformer.data.reading.documents import build_line_parser
from megatron_satformer.data.tokenizers.exact import build_tokenizer
from megatron_satformer.data.tokenizers.fast import FastTokenizer, fast_pipeline
from megatron_satformer.data.tokenizers.hugging_face import hide_torch
from megatron_satformer.data.tokenizers.options import TokenizerOptions

TOOLS = Path(__file__).resolve().parents[2] / "tools"
# Texts handed to a library in one call.
BATCH = 64
# Reading what a process has in memory takes milliseconds of a core, and stops the process.
SAMPLE_SECONDS = 0.25


@dataclass
class Timing:
    """What a command took: wall seconds of each run, and its peak memory.

    Attributes:
        name: What ran.
        seconds: Of each run.
        peak_bytes: Largest sum, over the processes of a run, of what each has in memory (pages
            shared by several count once).
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def median(self) -> float:
        """Median seconds."""
        return median(self.seconds)


def run_timed(timing: Timing, command: Sequence[str], megatron: Path | None = None) -> None:
    """Runs a command and adds its time and memory to `timing`.

    Args:
        timing: Where to.
        command: The command.
        megatron: A checkout whose packages come before installed ones.

    Raises:
        ValueError: If it fails.
    """
    packages = {} if megatron is None else {"PYTHONPATH": os.fspath(megatron)}
    start = time.perf_counter()
    with subprocess.Popen(
        list(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | packages,
    ) as process:
        stop = threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, timing, stop))
        watcher.start()
        output, _ = process.communicate()
        timing.seconds.append(time.perf_counter() - start)
        stop.set()
        watcher.join()
    if process.returncode:
        raise ValueError(f"{timing.name} failed: {' '.join(command)}\n{output[-2000:]}")


def _watch(pid: int, timing: Timing, stop: threading.Event) -> None:
    while not stop.wait(SAMPLE_SECONDS):
        try:
            root = psutil.Process(pid)
            processes = [root, *root.children(recursive=True)]
            total = sum(process.memory_full_info().pss for process in processes)
        except psutil.Error:
            continue
        timing.peak_bytes = max(timing.peak_bytes, total)


def preprocess_commands(
    source: Path,
    out: Path,
    flags: Sequence[str],
    workers: int,
    megatron: Path | None,
    hugging_face: bool,
) -> dict[str, tuple[list[str], Path]]:
    """Returns, by name, every command that tokenizes `source`, and the data set it writes."""
    usual = ["--input", os.fspath(source), *flags, "--append-eod"]
    ours = [sys.executable, os.fspath(TOOLS / "preprocess_data.py"), *usual]
    ours += ["--workers", str(workers), "--overwrite"]
    commands = {
        "ours, verify 0.01": ours,
        "ours, verify 0": [*ours, "--verify-fraction", "0"],
        "ours, reference": [*ours, "--tokenizer-backend", "reference"],
    }
    if megatron is not None:
        tool = os.fspath(megatron / "tools" / "preprocess_data.py")
        commands["Megatron-LM"] = [sys.executable, tool, *usual, "--workers", str(workers)]
        if hugging_face:
            tool = os.fspath(megatron / "tools" / "preprocess_data_fast.py")
            commands["Megatron-LM fast"] = [sys.executable, tool, *usual, "--use-gigatoken"]
    return {
        name: ([*command, "--output-prefix", f"{out}/data{n}"], out / f"data{n}_text_document")
        for n, (name, command) in enumerate(commands.items())
    }


def check_same_output(prefixes: Sequence[Path]) -> None:
    """Raises ValueError unless all the data sets are the same, byte for byte."""
    for prefix in prefixes[1:]:
        for path_of in (bin_path, idx_path):
            if not filecmp.cmp(path_of(prefixes[0]), path_of(prefix), shallow=False):
                raise ValueError(f"{path_of(prefix)} differs from {path_of(prefixes[0])}.")


def time_libraries(source: Path, options: TokenizerOptions, workers: int) -> Iterator[Timing]:
    """Yields what the tokenizer libraries alone take for the texts of `source`, in memory.

    Every worker process encodes its share; the clock runs from the moment all are ready.
    """
    context = get_context("spawn")
    for library in ("fast", "gigatoken", "reference"):
        with context.Manager() as manager, context.Pool(workers) as pool:
            barrier = manager.Barrier(workers)
            shares = [(library, source, options, n, workers, barrier) for n in range(workers)]
            spans = pool.starmap(_encode_share, shares, chunksize=1)
        found = [span for span in spans if span is not None]
        if len(found) == workers:
            begins, ends = zip(*found, strict=True)
            yield Timing(f"{library} library alone", [max(ends) - min(begins)])


def _encode_share(
    library: str,
    source: Path,
    options: TokenizerOptions,
    number: int,
    workers: int,
    barrier: threading.Barrier,
) -> tuple[float, float] | None:
    """Returns when this process began and ended, by a clock that all processes share."""
    hide_torch()
    texts: list[str] = []
    encode: Callable[[list[str]], object] | None = None
    try:
        encode = _library(library, options)
        parse = build_line_parser(["text"])
        with source.open("rb") as file:
            texts = [parse(line)[0] for line in islice(file, number, None, workers)]
    except Exception as error:
        # Not installed, or not for this tokenizer: there is no figure then.
        print(f"{library} library alone: {error}", file=sys.stderr)
    barrier.wait()
    begin = time.perf_counter()
    if encode is None:
        return None
    for batch in batched(texts, BATCH):
        encode(list(batch))
    return begin, time.perf_counter()


def _library(name: str, options: TokenizerOptions) -> Callable[[list[str]], object]:
    reference = build_tokenizer(options)
    if name == "reference":
        return reference.encode_batch
    if name == "fast":
        return FastTokenizer(fast_pipeline(options, reference)).encode_batch
    import gigatoken

    engine = gigatoken.Tokenizer(options.tokenizer_model)
    return lambda texts: engine.encode_batch(texts, parallel=False)


def time_files(prefix: Path, out: Path, repeat: int) -> dict[str, Timing]:
    """Times merging against `cp` and verifying against `sha256sum`, on a data set and a copy.

    Every command starts from files that are in memory, and writes are on disk at its end.
    """
    folder, copies, merged = out / "merge", out / "copies", out / "merged"
    for path in (folder, copies):
        path.mkdir(exist_ok=True)
    files = []
    for name in ("a", "b"):
        for path_of in (bin_path, idx_path):
            shutil.copyfile(path_of(prefix), path_of(folder / name))
            files.append(os.fspath(path_of(folder / name)))
    merge, inspect = (os.fspath(TOOLS / f"{n}.py") for n in ("merge_datasets", "inspect_dataset"))
    commands = {
        "cp": ["sh", "-c", f"cp {' '.join(files)} {copies} && sync {copies}/*"],
        "merge_datasets": [
            *[sys.executable, merge, "--input", os.fspath(folder)],
            *["--output-prefix", os.fspath(merged), "--overwrite"],
        ],
        "sha256sum": ["sha256sum", os.fspath(bin_path(merged)), os.fspath(idx_path(merged))],
        "inspect_dataset --verify": [sys.executable, inspect, os.fspath(merged), "--verify"],
    }
    timings = {name: Timing(name) for name in commands}
    for _ in range(repeat):
        for name, command in commands.items():
            run_timed(timings[name], command)
    return timings


def repeat_corpus(source: Path, target: Path, size: int) -> None:
    """Writes the lines of `source` over and over until `target` has `size` bytes."""
    content = source.read_bytes()
    content += b"" if content.endswith(b"\n") else b"\n"
    with target.open("wb") as file:
        while file.tell() < size:
            file.write(content)
