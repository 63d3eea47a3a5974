"""What a run of tokenizing is asked to do, and what it reports."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_satformer.data.datasets.indexed import check_prefix
from megatron_satformer.data.datasets.parts import part_prefix
from megatron_satformer.data.reading.chunks import CHUNK_BYTES
from megatron_satformer.data.reading.inputs import ON_UNKNOWN, STDIN
from megatron_satformer.data.tokenizers.options import TokenizerOptions

BACKENDS = ("auto", "reference", "fast")
ON_ERROR = ("stop", "skip")


@dataclass(frozen=True)
class PreprocessOptions:
    r"""What to tokenize and how; the field names are the flags of tools/preprocess_data.py.

    One object for a run, its encoding and its tokenizer: it travels whole from the command line to
    the workers.

    Attributes:
        input: In this order: files (.jsonl, .txt, also compressed; .parquet, .arrow), quoted
            globs, folders (also of Hugging Face datasets), or - for stdin.
        output_prefix: Writes PREFIX_KEY_document.bin and .idx, and PREFIX.manifest.json.
        tokenizer: The tokenizer flags.
        json_keys: Keys to tokenize, one data set each.
        append_eod: End every document that is not empty with the tokenizer's eod.
        document_separator: What stands between two documents of a .txt file, such as '\n\n',
            whether its lines end in LF or CRLF; '' for nothing: each file is one document.
        on_unknown: error where a folder or glob holds a file of a kind that is not read, or skip:
            leave such files out, say so, and list them in the manifest.
        keep_empty: Keep documents without a token as boundaries, as Megatron-LM's tool does.
        on_error: stop at the first bad document, or skip: leave bad ones out, and list them in
            PREFIX.rejects.jsonl.
        tokenizer_backend: auto is fast where the ids are the reference's, and the reference
            elsewhere.
        verify_fraction: Share of the documents whose fast ids are compared with the reference's; 1
            for all.
        workers: Number of processes; every core that this one may use if left out.
        log_interval: Documents between progress updates.
        json_log: File that gets the progress as JSON lines, appended.
        overwrite: Replace existing output, and unfinished work that does not fit.
        chunk_bytes: Text in a unit of work.
        num_parts: Cut the input into so many parts, each made by a command of its own into the
            folder PREFIX.parts, which merge_datasets.py then makes into what one run would have.
        part: Which of them to make, from 0.

    Raises:
        ValueError: If an option has a value it cannot have.
    """

    input: Sequence[str | os.PathLike[str]]
    output_prefix: str | os.PathLike[str]
    tokenizer: TokenizerOptions
    json_keys: Sequence[str] = ("text",)
    append_eod: bool = False
    document_separator: str | None = None
    on_unknown: str = "error"
    keep_empty: bool = False
    on_error: str = "stop"
    tokenizer_backend: str = "auto"
    verify_fraction: float = 0.01
    workers: int | None = None
    log_interval: int = 1000
    json_log: str | os.PathLike[str] | None = None
    overwrite: bool = False
    chunk_bytes: int = CHUNK_BYTES
    num_parts: int | None = None
    part: int | None = None

    def __post_init__(self) -> None:
        check_prefix("output_prefix", os.fspath(self.output_prefix))
        keys = list(self.json_keys)
        if not keys or len(set(keys)) != len(keys):
            raise ValueError(f"json_keys ({' '.join(keys)}) must name each key once.")
        self._check_part()
        if self.log_interval < 1:
            raise ValueError(f"log_interval ({self.log_interval}) must be at least 1.")
        if self.workers is not None and self.workers < 1:
            raise ValueError(
                f"workers ({self.workers}) must be at least 1. Leave it out to use every core."
            )
        if not 0 <= self.verify_fraction <= 1:
            raise ValueError(
                f"verify_fraction ({self.verify_fraction}) must be from 0 to 1. 0.01 checks one "
                "document in a hundred, 1 all of them."
            )
        choices_of = {
            "tokenizer_backend": BACKENDS,
            "on_error": ON_ERROR,
            "on_unknown": ON_UNKNOWN,
        }
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be one of {', '.join(choices)}."
                )

    def _check_part(self) -> None:
        if self.num_parts is None and self.part is None:
            return
        if self.num_parts is None or self.part is None:
            raise ValueError(
                f"part ({self.part}) must come with num_parts ({self.num_parts}). Give both, or "
                "neither for all in one run."
            )
        if not 0 <= self.part < self.num_parts:
            raise ValueError(
                f"part ({self.part}) must be from 0 to {self.num_parts - 1}, below num_parts "
                f"({self.num_parts})."
            )
        if len(self.json_keys) > 1:
            raise ValueError(
                f"json_keys ({' '.join(self.json_keys)}) must be one with num_parts "
                f"({self.num_parts}): merging takes one data set. Run once for each key."
            )
        if self.reads_stdin:
            raise ValueError(
                f"input (-) must be files with num_parts ({self.num_parts}): what comes through a "
                "pipe cannot be cut."
            )

    @property
    def own_prefix(self) -> str:
        """Prefix of what this run writes: the output's, or its part's."""
        if self.num_parts is None or self.part is None:
            return os.fspath(self.output_prefix)
        return part_prefix(self.output_prefix, self.num_parts, self.part)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Prefix of each key's data set."""
        path = Path(self.own_prefix)
        return tuple(f"{path}_{key}_document" for key in self.json_keys)

    @property
    def reads_stdin(self) -> bool:
        """Whether the input can be read only once."""
        return any(os.fspath(value) == STDIN for value in self.input)


@dataclass(frozen=True)
class PreprocessSummary:
    """What was written, over all keys.

    Attributes:
        prefixes: Prefix of each data set.
        documents: Documents written.
        empty_documents: Documents without a token.
        rejected_documents: Bad documents that were skipped.
        unread_files: Files of folders and globs that were not read, or read by another name.
        tokens: Tokens written.
        text_bytes: Bytes of input, uncompressed.
        resumed_bytes: Those of them that runs before this one had done.
        dtype: Of the tokens.
        backend: "fast" or "reference".
        verified_documents: Documents that both tokenizers encoded.
        routed_documents: Documents that the fast tokenizer left to the exact one.
        seconds: From the first check of this run to the last file.
    """

    prefixes: tuple[str, ...]
    documents: int
    empty_documents: int
    rejected_documents: int
    unread_files: int
    tokens: int
    text_bytes: int
    resumed_bytes: int
    dtype: str
    backend: str
    verified_documents: int
    routed_documents: int
    seconds: float
