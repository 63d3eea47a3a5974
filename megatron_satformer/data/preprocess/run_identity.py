"""What a run was asked to do, as plain values: only one that was asked the same continues it."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from megatron_satformer.data.preprocess.options import PreprocessOptions
from megatron_satformer.data.reading.inputs import Source
from megatron_satformer.data.tokenizers.options import TokenizerOptions

# Packages whose version may change ids.
LIBRARIES = ("sentencepiece", "tokenizers", "transformers", "tiktoken", "fastokens")
# Files of a model's folder that are no part of its tokenizer, and large.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


# Options on which the output depends.
ASKED = (
    *("append_eod", "document_separator", "keep_empty", "on_error", "on_unknown"),
    *("tokenizer_backend", "verify_fraction", "chunk_bytes", "num_parts", "part"),
)

# Changes that let a run go on which was stopped for what it found.
LOOSENED = {"on_error": ("stop", "skip"), "on_unknown": ("error", "skip")}


def describe_run(options: PreprocessOptions, sources: Sequence[Source]) -> dict[str, Any]:
    """Returns path, bytes and time of change of every input, and the options that matter."""
    return {
        "inputs": [
            {"path": os.path.abspath(s.path), "bytes": s.size, "mtime_ns": s.mtime_ns}
            for s in sources
        ],
        "json_keys": list(options.json_keys),
        **{name: getattr(options, name) for name in ASKED},
        "tokenizer": describe_tokenizer(options.tokenizer),
    }


def describe_tokenizer(options: TokenizerOptions) -> dict[str, Any]:
    """Returns the tokenizer flags, sha256 of the files they name, and the packages' versions."""
    values = asdict(options)
    found = {name: value for name, value in values.items() if value not in (None, False, ())}
    files: list[Path] = []
    for value in values.values():
        if isinstance(value, str) and os.path.exists(value):
            files += _files_of(Path(value))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    packages = {name: one.version for name in LIBRARIES for one in distributions(name=name)}
    return {**found, "sha256": digest.hexdigest(), "packages": packages}


def _files_of(path: Path) -> list[Path]:
    # Beside a tokenizer.json its folder's settings count too.
    folder = path if path.is_dir() else path.parent if path.name == "tokenizer.json" else None
    if folder is None:
        return [path]
    return sorted(
        file for file in folder.iterdir() if file.is_file() and file.suffix not in WEIGHTS
    )


def check_same_run(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuses to continue a run that was asked something else.

    `on_error` may go from stop to skip: that is how one continues after a bad document. So may
    `on_unknown`, whose effect on the inputs is compared.

    Args:
        before: What the unfinished run was asked; values of JSON.
        now: What this one is asked, with the same keys.
        folder: Where the unfinished work is.

    Raises:
        ValueError: Naming the first difference.
    """
    way_out = f"Undo that to go on with the work in {folder}, or pass --overwrite to start over."
    for old, new in zip(before.get("inputs", []), now["inputs"], strict=False):
        if old != new:
            what = f"input ({new['path']})"
            if old["path"] != new["path"]:
                raise ValueError(f"{what} was {old['path']} when this run began. {way_out}")
            sizes = f"{old['bytes']} bytes then, {new['bytes']} now"
            raise ValueError(f"{what} has changed since this run began ({sizes}). {way_out}")
    for key, new in now.items():
        old = before.get(key)
        if old == new or (old, new) == LOOSENED.get(key):
            continue
        if key == "inputs":
            raise ValueError(
                f"input has {len(new)} files, but had {len(old or [])} when this run began. "
                f"{way_out}"
            )
        if isinstance(new, dict) and isinstance(old, dict):
            key, old, new = next(
                (f"{key}: {name}", old.get(name), new.get(name))
                for name in [*new, *old]
                if old.get(name) != new.get(name)
            )
        raise ValueError(f"{key} ({new}) was {old} when this run began. {way_out}")
