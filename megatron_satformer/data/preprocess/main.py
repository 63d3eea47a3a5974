"""Documents to Megatron's indexed files: fast, in order, resumable, with bounded memory.

The output is byte for byte that of Megatron-LM's tools/preprocess_data.py for the same tokenizer
and input order, whatever the number of workers and however often the run was killed, and appears
only once it is complete. One thing differs: documents without a token are dropped, unless
`keep_empty` asks for Megatron's boundaries.
"""

import os
import sys
import time
from itertools import islice
from typing import Any

from megatron_satformer.data.datasets.indexed import check_output_free
from megatron_satformer.data.preprocess.encoding import (
    BadDocumentError,
    ChunkEncoder,
    MismatchError,
)
from megatron_satformer.data.preprocess.options import PreprocessOptions, PreprocessSummary
from megatron_satformer.data.preprocess.parts import finished_part, pieces_of, verify_part
from megatron_satformer.data.preprocess.pool import ChunkError, WorkerDiedError, encode_in_order
from megatron_satformer.data.preprocess.progress import Progress
from megatron_satformer.data.preprocess.run_folder import RunFolder
from megatron_satformer.data.reading.chunks import Chunk, read_chunks
from megatron_satformer.data.reading.documents import describe_bad, place_of
from megatron_satformer.data.reading.inputs import STDIN, Inputs, find_inputs
from megatron_satformer.data.tokenizers.exportable import export_warning
from megatron_satformer.data.tokenizers.fast import FastUnavailable, fast_pipeline

KEPT = "Put that right; the work so far is kept, run the same command to continue"
# Bytes of input below which the fast tokenizer takes longer to prepare than it saves.
SMALL = 1 << 20


def preprocess(options: PreprocessOptions) -> PreprocessSummary:
    """Tokenizes the input into one data set per key, or continues where a run before was stopped.

    Raises:
        ValueError: If a file or a document is bad, or unfinished work there belongs to another
            input or other options. Nothing has the final names then. Or if a part, read again at
            its end, is not what was written.
    """
    start = time.perf_counter()
    inputs = find_inputs(options.input, options.document_separator, options.on_unknown)
    if len(options.json_keys) > 1 and any(source.format == "txt" for source in inputs.sources):
        raise ValueError(
            f"json_keys ({' '.join(options.json_keys)}) must be one with plain text, which has no "
            "keys. Give one, to name the output."
        )
    pieces = pieces_of(options, inputs.sources)
    if (done := finished_part(options, inputs.sources)) is not None:
        print(f"part {options.part} was complete already, and is as it was made.", file=sys.stderr)
        seconds = time.perf_counter() - start
        return PreprocessSummary(
            options.prefixes, **done, resumed_bytes=done["text_bytes"], seconds=seconds
        )
    with RunFolder(options, pieces) as folder:
        try:
            if "publishing" not in folder.state:
                for prefix in options.prefixes:
                    check_output_free(prefix, options.overwrite)
            encoder = ChunkEncoder(options)
            if (warning := export_warning(options.tokenizer)) is not None:
                print(f"WARNING: {warning}", file=sys.stderr)
            folder.take_up(inputs.sources)
            if "publishing" in folder.state:
                # Killed between two renames.
                folder.finish_publishing()
                summary = folder.state["summary"]
                resumed = summary["text_bytes"]
            else:
                summary, resumed = TokenizeRun(folder, inputs, encoder).tokenize()
        except BaseException:
            if folder.is_empty() or options.reads_stdin:
                folder.remove()
            raise
    if options.part is not None:
        verify_part(options)
    seconds = time.perf_counter() - start
    return PreprocessSummary(options.prefixes, **summary, resumed_bytes=resumed, seconds=seconds)


class TokenizeRun:
    """The work of one call of `preprocess`, in a folder that is locked and checked."""

    def __init__(self, folder: RunFolder, inputs: Inputs, encoder: ChunkEncoder) -> None:
        self.options, self.folder = folder.options, folder
        self.sources, self.unread, self.encoder = inputs.sources, inputs.unread, encoder
        self.pieces = list(folder.pieces.values())

    def tokenize(self) -> tuple[dict[str, Any], int]:
        """Does what is left to do; returns the summary and the bytes that were done before."""
        self.folder.write_state(backend=self._choose_backend(self.folder.state["backend"]))
        while True:
            try:
                resumed = self._write_chunks()
                break
            except ChunkError as failed:
                if not isinstance(failed.cause, MismatchError):
                    raise self._explain(failed) from failed.cause
                self._report_mismatch(failed.chunk, failed.cause)
            self.encoder.pipeline = None
            self.folder.start("reference")
        try:
            self._check_complete()
        except ValueError:
            # Nothing here is worth continuing.
            self.folder.remove()
            raise
        summary = self._summarize()
        try:
            self.folder.publish(summary, self.unread)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"{self.folder.path}: {reason}. {KEPT}.") from None
        return summary, resumed

    def _choose_backend(self, choice: str) -> str:
        """Returns "fast" or "reference", and prepares the fast one."""
        if choice == "reference" or (choice == "auto" and 0 < self._input_bytes() < SMALL):
            return "reference"
        try:
            self.encoder.pipeline = fast_pipeline(self.options.tokenizer, self.encoder.exact)
        except FastUnavailable as reason:
            if self.options.tokenizer_backend == "fast":
                raise ValueError(
                    f"tokenizer_backend (fast) cannot serve this tokenizer: {reason} Use auto."
                ) from None
            print(f"note: tokenizing with the reference alone: {reason}", file=sys.stderr)
            return "reference"
        return "fast"

    def _write_chunks(self) -> int:
        """Tokenizes what is not written yet; returns the bytes that were."""
        folder, options = self.folder, self.options
        folder.open_files(self.encoder.dtype)
        resumed = folder.totals["bytes"]
        if folder.chunks:
            print(f"continuing after {resumed / 1e6:.1f} MB of input.", file=sys.stderr)
        chunks = read_chunks(
            self.sources,
            options.json_keys,
            options.document_separator,
            options.chunk_bytes,
            self.pieces,
        )
        left = islice(chunks, folder.chunks, None)
        total = sum(piece.end - piece.begin for piece in self.pieces)
        with Progress(options, total, folder.totals["file_bytes"]) as progress:
            for chunk, encoded in encode_in_order(left, self.encoder, self._count_workers()):
                try:
                    folder.append(chunk, encoded)
                except OSError as error:
                    raise ChunkError(chunk, error) from error
                progress.advance(chunk, encoded)
            progress.log("tokenized")
        return resumed

    def _summarize(self) -> dict[str, Any]:
        spools, totals = self.folder.spools, self.folder.totals
        return {
            "documents": sum(spool.documents for spool in spools),
            "empty_documents": sum(spool.empty for spool in spools),
            "rejected_documents": totals["rejected"],
            "unread_files": len(self.unread),
            "tokens": sum(spool.tokens for spool in spools),
            "text_bytes": totals["bytes"],
            "dtype": self.encoder.dtype.name,
            "backend": self.folder.state["backend"],
            "verified_documents": totals["verified"],
            "routed_documents": totals["routed"],
        }

    def _report_mismatch(self, chunk: Chunk, mismatch: MismatchError) -> None:
        """Warns, or raises ValueError where the user insists on the fast tokenizer."""
        found = (
            f"{self._place(chunk, mismatch.offset)}: the fast tokenizer differs from the reference "
            f"({mismatch.excerpt!r})"
        )
        if self.options.tokenizer_backend == "fast":
            raise ValueError(f"{found}. Use --tokenizer-backend auto or reference.")
        print(f"WARNING: {found}. Starting over with the reference alone.", file=sys.stderr)

    def _explain(self, failed: ChunkError) -> Exception:
        """Returns what to tell the user, or the error itself where it is our bug."""
        cause = failed.cause
        if isinstance(cause, BadDocumentError):
            number = self.folder.number_of(failed.chunk, cause.offset)
            told = describe_bad(failed.chunk.source, number, cause.reason)
            return ValueError(f"{told} Or pass --on-error skip, which continues from here.")
        place = self._place(failed.chunk)
        if isinstance(cause, WorkerDiedError):
            return ValueError(
                f"{place} or after it: a worker died (out of memory, or killed). {KEPT} with fewer "
                "--workers, or look in the system log for what killed it."
            )
        if isinstance(cause, OSError):
            return ValueError(f"{place}: {cause.strerror or cause}. {KEPT}.")
        return cause

    def _count_workers(self) -> int:
        """Returns how many processes to use: no more than cores, or chunks to hand out."""
        workers = self.options.workers or len(os.sched_getaffinity(0))
        if self.options.reads_stdin:
            return workers
        return min(workers, 1 + self._input_bytes() // self.options.chunk_bytes)

    def _input_bytes(self) -> int:
        """About how much text there is; 0 on standard input, where nobody knows."""
        # What is compressed may be several times as much text.
        return sum((p.end - p.begin) * (5 if p.source.compression else 1) for p in self.pieces)

    def _place(self, chunk: Chunk, offset: int = 0) -> str:
        return place_of(chunk.source, self.folder.number_of(chunk, offset))

    def _check_complete(self) -> None:
        names = ", ".join(source.path for source in self.sources)
        for source in (piece.source for piece in self.pieces):
            if source.path != STDIN:
                status = os.stat(source.path)
                if (status.st_size, status.st_mtime_ns) != (source.size, source.mtime_ns):
                    raise ValueError(
                        f"input ({source.path}) changed while it was read. Run again with "
                        "--overwrite once it is complete."
                    )
        if self.options.num_parts is not None:
            # Another part has documents, or all of them together are nothing to train on.
            return
        if not self.folder.totals["documents"]:
            raise ValueError(f"input ({names}) has no documents. Nothing was written.")
        for spool in self.folder.spools:
            if spool.tokens == 0:
                raise ValueError(
                    f"input ({names}): no document has a token, {spool.name} would be empty. "
                    "Nothing was written; see --json-keys."
                )
