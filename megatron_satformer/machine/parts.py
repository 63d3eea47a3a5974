"""Software and cards: versions, and whether each part really imports.

Every import happens in a process of its own: one that dies of a part built for another torch, or
waits for a card, takes nothing with it. Must not import torch, which may be what is broken.
"""

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

SECONDS = 180  # a first import from a network drive takes long


@dataclass(frozen=True)
class Part:
    """One package, the code that shows whether it works, and how to get it.

    Attributes:
        package: Its name for the package index.
        module: Missing where nothing is installed.
        code: Fails where it does not work. torch first, which finds the libraries of CUDA for what
            follows.
        use: What it is for.
        install: How to get it.
        needed: Whether training needs it.
    """

    package: str
    module: str
    code: str
    use: str
    install: str
    needed: bool = False


_ALL = "make install"
PARTS = (
    Part("numpy", "numpy", "import numpy", "arrays", _ALL, needed=True),
    Part("megatron-core", "megatron", "import megatron.core", "the engine", _ALL, needed=True),
    Part(
        "megatron helpers",
        "megatron",
        "from megatron.core.datasets import helpers_cpp",
        "the index of every data set",
        "pip install --force-reinstall --no-deps -c constraints.txt megatron-core",
        needed=True,
    ),
    Part("sentencepiece", "sentencepiece", "import sentencepiece", "tokenizers", _ALL, needed=True),
    Part("psutil", "psutil", "import psutil", "saving", _ALL, needed=True),
    Part(
        "transformer-engine",
        "transformer_engine",
        "import torch, transformer_engine.pytorch",
        "fused layers, fp8 and context parallelism on a GPU",
        "pip install -c constraints.txt --no-build-isolation -e '.[te]'",
    ),
    Part(
        "apex",
        "apex",
        "import torch, amp_C",
        "fused optimizers without Transformer Engine",
        "build NVIDIA's from github.com/NVIDIA/apex (the apex of the package index is another)",
    ),
    Part(
        "flash-attn",
        "flash_attn",
        "import torch, flash_attn",
        "Transformer Engine's attention of some shapes",
        "pip install --no-build-isolation flash-attn",
    ),
    Part("triton", "triton", "import triton", "fused mixing on a GPU", "comes with torch for CUDA"),
    Part(
        "transformers",
        "transformers",
        "import transformers",
        "export and evaluation",
        "pip install -c constraints.txt -e '.[hf]'",
    ),
    Part(
        "tensorboard",
        "tensorboard",
        "from torch.utils.tensorboard import SummaryWriter",
        "--tensorboard-dir",
        "pip install -c constraints.txt -e '.[logging]'",
    ),
    Part(
        "wandb", "wandb", "import wandb", "--wandb-project", "pip install -c constraints.txt wandb"
    ),
    Part(
        "nvidia-resiliency-ext",
        "nvidia_resiliency_ext",
        "from megatron.core.dist_checkpointing.strategies.torch import get_async_strategy\n"
        "get_async_strategy('nvrx')",
        "--async-save in its default strategy (else --async-strategy mcore)",
        "pip install nvidia-resiliency-ext",
    ),
)
_CARDS = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": []}
if torch.cuda.is_available():
    found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["memory"] = [torch.cuda.get_device_properties(i).total_memory
                       for i in range(torch.cuda.device_count())]
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
print(json.dumps(found))
"""


def try_code(code: str) -> tuple[str, str]:
    """Runs code in a process of its own.

    Returns:
        What it printed, and its last line on stderr if it failed, else "".
    """
    command = [sys.executable, "-W", "ignore", "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "", f"not done in {SECONDS} seconds"
    told = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
    return done.stdout.strip(), told[-1] if done.returncode else ""


def find_cards() -> tuple[dict[str, Any], str]:
    """torch, the CUDA and NCCL it is built with, and the GPUs it sees; or why torch fails."""
    printed, failure = try_code(_CARDS)
    return ({}, failure) if failure else (json.loads(printed.splitlines()[-1]), "")


def find_version(part: Part) -> str | None:
    """Version of what is installed, None where it is not known."""
    try:
        return version(part.package)
    except PackageNotFoundError:
        return None


def try_part(part: Part) -> tuple[bool, str]:
    """Whether anything of a part is installed, and why it does not work, "" if it does."""
    if importlib.util.find_spec(part.module) is None:
        return False, "not installed"
    return True, try_code(part.code)[1]


def describe_machine() -> dict[str, Any]:
    """Cards, versions, and of each part its version or why it is not there, for a report."""
    cards, failure = find_cards()
    found: dict[str, Any] = {"python": sys.version.split()[0], **cards}
    if failure:
        found["torch"] = f"not there: {failure}"
    for part in PARTS:
        _, failure = try_part(part)
        told = find_version(part) or "imports, version not known"
        found[part.package] = f"not there: {failure}" if failure else told
    return found
