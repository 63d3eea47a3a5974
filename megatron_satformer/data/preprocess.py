"""JSON lines to Megatron's indexed files, in parallel, in order, with bounded memory.

The output is byte for byte that of Megatron-LM's tools/preprocess_data.py for the same tokenizer
and input order, whatever the number of workers, and appears only once it is complete.
"""

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megatron_satformer.data.documents import CHUNK_BYTES, check_inputs, read_chunks
from megatron_satformer.data.encoding import encode_in_order
from megatron_satformer.data.indexed import IndexedWriter, publish
from megatron_satformer.data.progress import Progress
from megatron_satformer.data.tokenizers import TokenizerOptions, build_tokenizer


@dataclass(frozen=True)
class PreprocessOptions:
    """What to tokenize and how; the field names are the flags of tools/preprocess_data.py.

    Attributes:
        input: JSON lines files, `.gz` or plain, in the order of the output.
        output_prefix: Each key's files are `<output_prefix>_<key>_document.bin` and `.idx`.
        tokenizer: The tokenizer flags.
        json_keys: Keys of each line to tokenize, one data set each.
        append_eod: Whether each document that is not empty ends with the tokenizer's `eod`.
        workers: Number of processes; None is the number of cores this process may use.
        log_interval: Documents between two progress reports.
        overwrite: Whether existing output may be replaced.
    """

    input: Sequence[str | os.PathLike[str]]
    output_prefix: str | os.PathLike[str]
    tokenizer: TokenizerOptions
    json_keys: Sequence[str] = ("text",)
    append_eod: bool = False
    workers: int | None = None
    log_interval: int = 1000
    overwrite: bool = False


@dataclass(frozen=True)
class PreprocessSummary:
    """What was written: documents and tokens of all keys, bytes of JSON read, seconds it took."""

    prefixes: tuple[str, ...]
    documents: int
    empty_documents: int
    tokens: int
    json_bytes: int
    dtype: str
    seconds: float


def count_workers(workers: int | None, files: Sequence[Path]) -> int:
    """Returns how many processes to use: no more than there are cores, or chunks to hand out."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers ({workers}) must be at least 1. Leave it out to use every core.")
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    return min(workers, 1 + sum(path.stat().st_size for path in files) // CHUNK_BYTES)


def preprocess(options: PreprocessOptions) -> PreprocessSummary:
    """Tokenizes the input into one data set per key.

    Raises:
        ValueError: If an option, a file or a line is bad. Nothing has the final names then.
    """
    start = time.perf_counter()
    files = check_inputs(options.input)
    keys = list(options.json_keys)
    if not keys or len(set(keys)) != len(keys):
        raise ValueError(f"json_keys ({' '.join(keys)}) must name each key once.")
    if options.log_interval < 1:
        raise ValueError(f"log_interval ({options.log_interval}) must be at least 1.")
    workers = count_workers(options.workers, files)
    tokenizer = build_tokenizer(options.tokenizer)
    if options.append_eod and tokenizer.eod is None:
        raise ValueError(
            "append_eod needs a tokenizer with an end-of-sequence token; "
            f"{options.tokenizer.tokenizer_model} has none. Use one that has (for a "
            "tokenizer.json: its whole folder), or leave the flag out."
        )
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                IndexedWriter(
                    f"{os.fspath(options.output_prefix)}_{key}_document",
                    tokenizer.vocab_size,
                    options.overwrite,
                )
            )
            for key in keys
        ]
        progress = stack.enter_context(
            Progress(sum(path.stat().st_size for path in files), options.log_interval)
        )
        lines = json_bytes = 0
        for encoded in encode_in_order(
            read_chunks(files), options.tokenizer, keys, options.append_eod, workers
        ):
            for writer, (ids, lengths) in zip(writers, encoded.keys, strict=True):
                writer.add_documents(ids, lengths)
            lines += encoded.documents
            json_bytes += encoded.json_bytes
            tokens = sum(ids.size for ids, _ in encoded.keys)
            progress.advance(encoded.documents, encoded.json_bytes, tokens, encoded.file_bytes)
        _check_not_empty(writers, files, lines)
        publish(writers)
    return PreprocessSummary(
        prefixes=tuple(writer.prefix for writer in writers),
        documents=sum(writer.documents for writer in writers),
        empty_documents=sum(writer.empty_documents for writer in writers),
        tokens=sum(writer.tokens for writer in writers),
        json_bytes=json_bytes,
        dtype=writers[0].dtype.name,
        seconds=time.perf_counter() - start,
    )


def _check_not_empty(writers: Sequence[IndexedWriter], files: Sequence[Path], lines: int) -> None:
    names = ", ".join(map(str, files))
    if lines == 0:
        raise ValueError(f"input ({names}) has no documents. Nothing was written.")
    for writer in writers:
        if writer.tokens == 0:
            raise ValueError(
                f"input ({names}): every document is empty, {writer.prefix} would hold no token. "
                "Nothing was written; see --json-keys."
            )
