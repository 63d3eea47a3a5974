"""What a run of tokenizing is asked to do, and what it reports."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_satformer.data.reading.chunks import CHUNK_BYTES
from megatron_satformer.data.reading.inputs import Source
from megatron_satformer.data.tokenizers.options import TokenizerOptions

BACKENDS = ("auto", "reference", "fast")
ON_ERROR = ("stop", "skip")


@dataclass(frozen=True)
class PreprocessOptions:
    """What to tokenize and how; the field names are the flags of tools/preprocess_data.py.

    Attributes:
        input: Files, globs, folders, or `-` for standard input, in the order of the output.
        output_prefix: Each key's files are `<output_prefix>_<key>_document.bin` and `.idx`.
        tokenizer: The tokenizer flags.
        json_keys: Keys of each document to tokenize, one data set each.
        append_eod: Whether each document that is not empty ends with the tokenizer's `eod`.
        document_separator: What stands between two documents of plain text; "" for none.
        keep_empty: Whether documents without a token stay as boundaries, as in Megatron-LM.
        on_error: "stop" at the first bad document, or "skip" and write it to the rejects file.
        tokenizer_backend: "auto" (fast where it is exact), "reference" or "fast".
        verify_fraction: Share of the documents that the reference encodes beside the fast one.
        workers: Number of processes; None is the number of cores this process may use.
        log_interval: Documents between two progress reports.
        json_log: File for progress reports as JSON lines, or None.
        overwrite: Whether existing output may be replaced.
        chunk_bytes: Text in a unit of work.
    """

    input: Sequence[str | os.PathLike[str]]
    output_prefix: str | os.PathLike[str]
    tokenizer: TokenizerOptions
    json_keys: Sequence[str] = ("text",)
    append_eod: bool = False
    document_separator: str | None = None
    keep_empty: bool = False
    on_error: str = "stop"
    tokenizer_backend: str = "auto"
    verify_fraction: float = 0.01
    workers: int | None = None
    log_interval: int = 1000
    json_log: str | os.PathLike[str] | None = None
    overwrite: bool = False
    chunk_bytes: int = CHUNK_BYTES


@dataclass(frozen=True)
class PreprocessSummary:
    """What was written, over all keys.

    Attributes:
        prefixes: Prefix of each data set.
        documents: Documents written.
        empty_documents: Documents without a token.
        rejected_documents: Bad documents that were skipped.
        tokens: Tokens written.
        text_bytes: Bytes of input, uncompressed.
        resumed_bytes: Those of them that runs before this one had done.
        dtype: Of the tokens.
        backend: "fast" or "reference".
        verified_documents: Documents that both tokenizers encoded.
        routed_documents: Documents that the fast tokenizer left to the reference.
        seconds: From the first check of this run to the last file.
    """

    prefixes: tuple[str, ...]
    documents: int
    empty_documents: int
    rejected_documents: int
    tokens: int
    text_bytes: int
    resumed_bytes: int
    dtype: str
    backend: str
    verified_documents: int
    routed_documents: int
    seconds: float


def check_options(options: PreprocessOptions, sources: Sequence[Source]) -> None:
    """Raises ValueError if an option has a value it cannot have."""
    keys = list(options.json_keys)
    if not keys or len(set(keys)) != len(keys):
        raise ValueError(f"json_keys ({' '.join(keys)}) must name each key once.")
    if len(keys) > 1 and any(source.format == "txt" for source in sources):
        raise ValueError(
            f"json_keys ({' '.join(keys)}) must be one with plain text, which has no keys. Give "
            "one, to name the output."
        )
    if options.log_interval < 1:
        raise ValueError(f"log_interval ({options.log_interval}) must be at least 1.")
    if options.workers is not None and options.workers < 1:
        raise ValueError(
            f"workers ({options.workers}) must be at least 1. Leave it out to use every core."
        )
    if not 0 <= options.verify_fraction <= 1:
        raise ValueError(
            f"verify_fraction ({options.verify_fraction}) must be from 0 to 1. 0.01 checks one "
            "document in a hundred, 1 all of them."
        )
    for name, choices in (("tokenizer_backend", BACKENDS), ("on_error", ON_ERROR)):
        if getattr(options, name) not in choices:
            raise ValueError(
                f"{name} ({getattr(options, name)}) must be one of {', '.join(choices)}."
            )
