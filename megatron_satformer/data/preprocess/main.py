"""Documents to Megatron's indexed files: fast, in order, resumable, with bounded memory.

The output is byte for byte that of Megatron-LM's tools/preprocess_data.py for the same tokenizer
and input order, whatever the number of workers and however often the run was killed, and appears
only once it is complete. One thing differs: documents without a token are dropped, unless
`keep_empty` asks for Megatron's boundaries.
"""

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_satformer.data.datasets.indexed import bin_path, check_prefix, idx_path
from megatron_satformer.data.preprocess.options import (
    PreprocessOptions,
    PreprocessSummary,
    check_options,
)
from megatron_satformer.data.preprocess.run_folder import RunFolder
from megatron_satformer.data.preprocess.run_identity import (
    check_same_run,
    describe_inputs,
    describe_tokenizer,
)
from megatron_satformer.data.preprocess.tokenize_run import TokenizeRun
from megatron_satformer.data.reading.inputs import STDIN, Source, find_inputs
from megatron_satformer.data.tokenizers.exact import Tokenizer, build_tokenizer


def preprocess(options: PreprocessOptions) -> PreprocessSummary:
    """Tokenizes the input into one data set per key, or continues where a run before was stopped.

    Raises:
        ValueError: If an option, a file or a document is bad, or unfinished work there belongs to
            another input or other options. Nothing has the final names then.
    """
    start = time.perf_counter()
    sources = find_inputs(options.input, options.document_separator)
    check_options(options, sources)
    prefix = os.fspath(options.output_prefix)
    check_prefix("output_prefix", prefix)
    names = [f"{Path(prefix).name}_{key}_document" for key in options.json_keys]
    prefixes = tuple(os.fspath(Path(prefix).parent / name) for name in names)
    with RunFolder(prefix) as folder:
        state = folder.read_state()
        try:
            if state is None or "publishing" not in state:
                _check_output_free(prefixes, options.overwrite)
            tokenizer = _build_reference(options)
            asked = _describe(options, sources)
            state = _take_up(folder, state, asked, options)
            if "publishing" in state:
                # Killed between two renames.
                folder.finish_publishing(state["publishing"])
                summary, resumed = state["summary"], state["summary"]["text_bytes"]
            else:
                run = TokenizeRun(options, sources, folder, names, tokenizer)
                summary, resumed = run.tokenize(state)
        except BaseException:
            if folder.is_empty() or _reads_stdin(options):
                folder.remove()
            raise
    seconds = time.perf_counter() - start
    return PreprocessSummary(prefixes, **summary, resumed_bytes=resumed, seconds=seconds)


def _reads_stdin(options: PreprocessOptions) -> bool:
    return any(os.fspath(value) == STDIN for value in options.input)


def _check_output_free(prefixes: Iterable[str], overwrite: bool) -> None:
    for path in (file for prefix in prefixes for file in (idx_path(prefix), bin_path(prefix))):
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists already. Pass --overwrite, or choose another output.")


def _build_reference(options: PreprocessOptions) -> Tokenizer:
    tokenizer = build_tokenizer(options.tokenizer)
    if options.append_eod and tokenizer.eod is None:
        raise ValueError(
            "append_eod needs a tokenizer with an end-of-sequence token; "
            f"{options.tokenizer.tokenizer_model} has none. Use one that has (for a "
            "tokenizer.json: its whole folder), or leave the flag out."
        )
    if options.append_eod and not 0 <= (tokenizer.eod or 0) < tokenizer.vocab_size:
        raise ValueError(
            f"append_eod needs an end-of-sequence token inside the vocabulary; {tokenizer.eod} is "
            f"not in [0, {tokenizer.vocab_size}). Use another tokenizer, or leave the flag out."
        )
    return tokenizer


def _describe(options: PreprocessOptions, sources: Sequence[Source]) -> dict[str, Any]:
    names = (
        "append_eod",
        "document_separator",
        "keep_empty",
        "on_error",
        "tokenizer_backend",
        "verify_fraction",
        "chunk_bytes",
    )
    return {
        "inputs": describe_inputs(sources),
        "json_keys": list(options.json_keys),
        **{name: getattr(options, name) for name in names},
        "tokenizer": describe_tokenizer(options.tokenizer),
    }


def _take_up(
    folder: RunFolder,
    state: dict[str, Any] | None,
    asked: dict[str, Any],
    options: PreprocessOptions,
) -> dict[str, Any]:
    """Returns the state to work from: the unfinished one if it was asked the same, or a new one."""
    if state is not None and not _reads_stdin(options):
        try:
            check_same_run(state["asked"], asked, folder.path)
            return {**state, "asked": asked}
        except ValueError:
            if not options.overwrite:
                raise
    new = {"asked": asked, "backend": options.tokenizer_backend}
    folder.start(new)
    return new
