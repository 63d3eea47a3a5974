"""What works on this machine and what to do about the rest, a line each.

Must not import torch: what is broken may be just that.
"""

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_satformer.machine.parts import PARTS, Part, find_cards, find_version, try_part

State = Literal["ok", "note", "FAIL"]
OPEN_FILES, SHARED_MEMORY, DISK_SPEED, FREE_DISK = 4096, 2**30, 50 * 10**6, 20 * 10**9
_BLOCK = 2**22
# All that Megatron asks of a backend at start: a group, a sum, a barrier.
_COLLECTIVE = """
import datetime, sys, torch
backend, rank, count, store = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if backend == "nccl":
    torch.cuda.set_device(rank)
limit = datetime.timedelta(seconds=60)
torch.distributed.init_process_group(backend, init_method="file://" + store, rank=rank,
                                     world_size=count, timeout=limit)
ones = torch.ones(4, device="cuda" if backend == "nccl" else "cpu")
torch.distributed.all_reduce(ones)
assert ones.tolist() == [count] * 4, ones
torch.distributed.destroy_process_group()
"""


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do if that is not well.

    Attributes:
        state: "ok"; "note" where something optional is missing or slow; "FAIL" where training
            cannot work.
        name: What was looked at.
        what: How it is.
        advice: What to do.
    """

    state: State
    name: str
    what: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.state:<5}{self.name:<23}{self.what}" + f"  -> {self.advice}" * bool(
            self.advice
        )


def check_machine(folder: str, megabytes: int = 256) -> Iterator[Finding]:
    """Looks at everything, in an order in which causes come before what they cause.

    Args:
        folder: Where checkpoints would be saved: its disk is measured, and left as it was.
        megabytes: Written and read there.
    """
    yield check_python()
    cards, failure = find_cards()
    if failure:
        yield Finding("FAIL", "torch", failure, "make install")
    else:
        yield Finding("ok", "torch", f"{cards['torch']}{_tested('torch', cards['torch'])}")
        yield from check_cards(cards)
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(check_part, PARTS)
    if not failure:
        yield check_collective("gloo", 2)
        if cards["gpus"]:
            yield check_collective("nccl", min(2, len(cards["gpus"])))
    yield check_disk(Path(folder), megabytes)
    yield check_space(Path(folder))
    yield check_shared_memory()
    yield check_open_files()
    yield check_cores()


def check_python() -> Finding:
    """Looks at the Python that runs this."""
    told = sys.version.split()[0]
    return Finding("ok", "python", f"{told}, {sys.executable}")


def check_cards(cards: dict) -> Iterator[Finding]:
    """Tells of CUDA, NCCL and the GPUs that torch sees."""
    if not cards["cuda"]:
        advice = "install a CUDA build of torch" if shutil.which("nvidia-smi") else ""
        yield Finding("note", "CUDA", "torch is built without it: training runs on the CPU", advice)
    elif not cards["gpus"]:
        driver = shutil.which("nvidia-smi")
        advice = (
            "nvidia-smi, and whether the driver is new enough for this CUDA"
            if driver
            else "nothing, where there is no card; else install the driver"
        )
        what = f"{cards['cuda']}, and torch sees no GPU: training runs on the CPU"
        yield Finding("note", "CUDA", what, advice)
    else:
        yield Finding("ok", "CUDA", f"{cards['cuda']}, NCCL {cards['nccl']}")
        sizes = zip(cards["gpus"], cards["memory"], strict=True)
        told = ", ".join(f"{name} ({size / 2**30:.0f} GiB)" for name, size in sizes)
        yield Finding("ok", "GPUs", f"{len(cards['gpus'])}: {told}")


def check_part(part: Part) -> Finding:
    """Imports one part in a process of its own."""
    known = find_version(part)
    installed, failure = try_part(part)
    if not failure:
        return Finding("ok", part.package, f"{known or 'works'}{_tested(part.package, known)}")
    what = f"not installed; for {part.use}"
    if installed:
        what = f"{known or 'it is there and'} does not import: {failure}"
    return Finding("FAIL" if part.needed else "note", part.package, what, part.install)


def _tested(package: str, installed: str | None) -> str:
    """Says so where a version is not the one that this project is tested with."""
    constraints = Path(__file__).parents[2] / "constraints.txt"
    if not (installed and constraints.is_file()):
        return ""
    match = re.search(rf"^{re.escape(package)}==(\S+)", constraints.read_text(), re.MULTILINE)
    if match is None or installed.split("+")[0] == match[1]:
        return ""
    return f" (tested with {match[1]})"


def check_collective(backend: str, processes: int) -> Finding:
    """Sums a number over processes."""
    name = f"{backend} between {processes}" if processes > 1 else f"{backend} on one"
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        running = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", _COLLECTIVE, backend, str(rank)]
                + [str(processes), f"{folder}/store"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        failures = []
        for process in running:
            try:
                told = process.communicate(timeout=120)[1].strip().splitlines()
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                told = ["not done in two minutes"]
            if process.returncode:
                failures.append(told[-1] if told else f"ended with {process.returncode}")
    if not failures:
        return Finding("ok", name, f"works ({time.monotonic() - start:.0f} s with imports)")
    advice = (
        f"check that {socket.gethostname()} resolves; export GLOO_SOCKET_IFNAME=lo on one machine"
        if backend == "gloo"
        else "NCCL_DEBUG=INFO shows why; compare driver, CUDA and NCCL"
    )
    return Finding("FAIL", name, failures[0], advice)


def check_disk(folder: Path, megabytes: int) -> Finding:
    """Measures writing to disk and reading back, and leaves nothing behind."""
    name = "disk"
    block = os.urandom(_BLOCK)
    count = max(1, megabytes * 10**6 // _BLOCK)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            for _ in range(count):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            writing = count * _BLOCK / (time.perf_counter() - start)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            start = time.perf_counter()
            while file.read(_BLOCK):
                pass
            reading = count * _BLOCK / (time.perf_counter() - start)
    except OSError as error:
        return Finding("FAIL", name, f"{folder}: {error.strerror}", "give another --folder")
    what = f"{folder.absolute()}: writes {writing / 1e6:.0f} MB/s, reads {reading / 1e6:.0f} MB/s"
    if writing < DISK_SPEED:
        # A checkpoint with optimizer holds 14 bytes a parameter.
        each = 1.3e9 * 14 / writing / 60
        return Finding("note", name, what, f"a save of 1.3B takes {each:.0f} minutes here")
    return Finding("ok", name, what)


def check_space(folder: Path) -> Finding:
    """Looks at what is free on the disk of a folder."""
    free = shutil.disk_usage(folder if folder.is_dir() else ".").free
    what = f"{free / 1e9:.0f} GB free"
    if free < FREE_DISK:
        return Finding("note", "disk space", what, "one checkpoint of 1.3B takes 18 GB")
    return Finding("ok", "disk space", what)


def check_shared_memory(place: Path = Path("/dev/shm")) -> Finding:
    """Looks at what data loaders and NCCL hand over through."""
    if not place.is_dir():
        return Finding("note", "shared memory", f"no {place}", "give training --num-workers 0")
    size = shutil.disk_usage(place)
    what = f"{size.free / 2**30:.1f} of {size.total / 2**30:.1f} GiB free in {place}"
    if size.free < SHARED_MEMORY:
        return Finding("note", "shared memory", what, "docker run --shm-size=8g, or --ipc=host")
    return Finding("ok", "shared memory", what)


def check_open_files() -> Finding:
    """Looks at how many files a process may have open; data sets and ranks take many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = {resource.RLIM_INFINITY: "unlimited"}
    what = f"{told.get(soft, soft)}, at most {told.get(hard, hard)}"
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        most = hard if 0 < hard < OPEN_FILES else OPEN_FILES
        advice = f"ulimit -n {most}" if most > soft else "let an administrator raise it"
        return Finding("note", "open files (ulimit -n)", what, advice)
    return Finding("ok", "open files (ulimit -n)", what)


def check_cores() -> Finding:
    """Looks at the cores and the memory that this process may use."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Finding("ok", "CPU", f"{cores} cores, {memory:.0f} GiB memory")
