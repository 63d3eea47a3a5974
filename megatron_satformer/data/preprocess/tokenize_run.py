"""The work of one run: chunks to tokens, in order, into the run's folder, then to final names."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_satformer.data.datasets.indexed import token_dtype
from megatron_satformer.data.preprocess.encoding import (
    BadDocumentError,
    Encoded,
    EncodingOptions,
    MismatchError,
)
from megatron_satformer.data.preprocess.finish import publish_run
from megatron_satformer.data.preprocess.options import PreprocessOptions
from megatron_satformer.data.preprocess.pool import ChunkError, WorkerDiedError, encode_in_order
from megatron_satformer.data.preprocess.progress import Progress
from megatron_satformer.data.preprocess.run_folder import RunFolder, Spool
from megatron_satformer.data.reading.chunks import Chunk, describe_bad, read_chunks
from megatron_satformer.data.reading.inputs import STDIN, Source
from megatron_satformer.data.tokenizers.exact import Tokenizer
from megatron_satformer.data.tokenizers.fast import FastUnavailable, fast_pipeline
from megatron_satformer.data.tokenizers.hugging_face import copy_backend

# What a chunk's record counts, and a run adds up.
COUNTS = ("documents", "bytes", "file_bytes", "rejected", "verified", "routed")
KEPT = "Put that right; the work so far is kept, run the same command to continue"
# Bytes of input below which the fast tokenizer takes longer to prepare than it saves.
SMALL = 1 << 20


class TokenizeRun:
    """The work of one call of `preprocess`, on a folder that is locked and checked."""

    def __init__(
        self,
        options: PreprocessOptions,
        sources: Sequence[Source],
        folder: RunFolder,
        names: Sequence[str],
        reference: Tokenizer,
    ) -> None:
        self.options, self.sources, self.folder, self.names = options, sources, folder, names
        self.reference = reference
        self.encoding = EncodingOptions(
            options.tokenizer,
            tuple(options.json_keys),
            reference.vocab_size,
            reference.eod if options.append_eod else None,
            options.keep_empty,
            options.on_error == "skip",
            verify_fraction=options.verify_fraction,
            copy=copy_backend(reference),
        )
        # Documents seen of each source: what a message counts from.
        self.seen: Counter[int] = Counter()
        self.totals: Counter[str] = Counter()

    def tokenize(self, state: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Does what is left to do; returns the summary and the bytes that were done before."""
        state = {**state, "backend": self._choose_backend(state["backend"])}
        self.folder.write_state(state)
        while True:
            try:
                spools, resumed = self._write_chunks()
                break
            except ChunkError as failed:
                if not isinstance(failed.cause, MismatchError):
                    raise self._explain(failed) from failed.cause
                self._report_mismatch(failed.chunk, failed.cause)
            state = {**state, "backend": "reference"}
            self.folder.start(state)
            self.encoding = replace(self.encoding, pipeline=None)
        try:
            self._check_complete(spools)
        except ValueError:
            # Nothing here is worth continuing.
            self.folder.remove()
            raise
        summary = {
            "documents": sum(spool.documents for spool in spools),
            "empty_documents": sum(spool.empty for spool in spools),
            "rejected_documents": self.totals["rejected"],
            "tokens": sum(spool.tokens for spool in spools),
            "text_bytes": self.totals["bytes"],
            "dtype": spools[0].dtype.name,
            "backend": state["backend"],
            "verified_documents": self.totals["verified"],
            "routed_documents": self.totals["routed"],
        }
        prefix = os.fspath(self.options.output_prefix)
        try:
            publish_run(self.folder, prefix, spools, state, summary)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"{self.folder.path}: {reason}. {KEPT}.") from None
        return summary, resumed

    def _choose_backend(self, choice: str) -> str:
        """Returns "fast" or "reference", and prepares the fast one."""
        if choice == "reference" or (choice == "auto" and 0 < self._input_bytes() < SMALL):
            return "reference"
        try:
            pipeline = fast_pipeline(self.options.tokenizer, self.reference)
        except FastUnavailable as reason:
            if self.options.tokenizer_backend == "fast":
                raise ValueError(
                    f"tokenizer_backend (fast) cannot serve this tokenizer: {reason} Use auto."
                ) from None
            print(f"note: tokenizing with the reference alone: {reason}", file=sys.stderr)
            return "reference"
        self.encoding = replace(self.encoding, pipeline=pipeline)
        return "fast"

    def _write_chunks(self) -> tuple[list[Spool], int]:
        spools, records = self.folder.open_files(self.names, token_dtype(self.reference.vocab_size))
        self.seen.clear()
        self.totals.clear()
        for record in records:
            self._count(record)
        resumed = self.totals["bytes"]
        if records:
            print(f"continuing after {resumed / 1e6:.1f} MB of input.", file=sys.stderr)
        total = sum(source.size for source in self.sources)
        chunks = read_chunks(
            self.sources,
            self.options.json_keys,
            self.options.document_separator,
            self.options.chunk_bytes,
        )
        left = ((number, chunk) for number, chunk in enumerate(chunks) if number >= len(records))
        with Progress(
            total, self.options.log_interval, self.options.json_log, self.totals["file_bytes"]
        ) as progress:
            for _, chunk, encoded in encode_in_order(
                left, self.encoding, self._count_workers(), self.reference
            ):
                self._write(chunk, encoded)
                tokens = sum(part.ids.size for part in encoded.keys)
                progress.advance(encoded.documents, encoded.text_bytes, tokens, chunk.file_bytes)
            progress.log("tokenized")
        return spools, resumed

    def _write(self, chunk: Chunk, encoded: Encoded) -> None:
        source = self.sources[chunk.source]
        rejects = [
            {
                "file": source.path,
                source.unit: self.seen[chunk.source] + bad.offset + 1,
                "reason": bad.reason,
                "begins": bad.excerpt,
            }
            for bad in encoded.rejected
        ]
        record = {
            "source": chunk.source,
            "documents": encoded.documents,
            "bytes": encoded.text_bytes,
            "file_bytes": chunk.file_bytes,
            "rejected": len(rejects),
            "verified": encoded.verified,
            "routed": encoded.routed,
        }
        try:
            self.folder.append(record, encoded.keys, rejects)
        except OSError as error:
            raise ChunkError(chunk, error) from error
        self._count(record)

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
            source = self.sources[failed.chunk.source]
            number = self.seen[failed.chunk.source] + cause.offset + 1
            return ValueError(
                f"{describe_bad(source, number, cause.reason)} Or pass --on-error skip, which "
                "continues from here."
            )
        place = self._place(failed.chunk)
        if isinstance(cause, WorkerDiedError):
            return ValueError(
                f"{place} or after it: a worker died (out of memory, or killed). {KEPT} with fewer "
                "--workers, or look in the system log for what killed it."
            )
        if isinstance(cause, OSError):
            return ValueError(f"{place}: {cause.strerror or cause}. {KEPT}.")
        return cause

    def _count(self, record: dict[str, Any]) -> None:
        self.seen[record["source"]] += record["documents"]
        self.totals.update({name: record[name] for name in COUNTS})

    def _count_workers(self) -> int:
        """Returns how many processes to use: no more than cores, or chunks to hand out."""
        workers = self.options.workers or len(os.sched_getaffinity(0))
        if any(source.path == STDIN for source in self.sources):
            return workers
        return min(workers, 1 + self._input_bytes() // self.options.chunk_bytes)

    def _input_bytes(self) -> int:
        """About how much text there is; 0 on standard input, where nobody knows."""
        # What is compressed may be several times as much text.
        return sum(s.size * (5 if s.compression else 1) for s in self.sources)

    def _place(self, chunk: Chunk, offset: int = 0) -> str:
        source = self.sources[chunk.source]
        return f"{source.path}, {source.unit} {self.seen[chunk.source] + offset + 1}"

    def _check_complete(self, spools: Sequence[Spool]) -> None:
        names = ", ".join(source.path for source in self.sources)
        for source in self.sources:
            if source.path != STDIN:
                status = os.stat(source.path)
                if (status.st_size, status.st_mtime_ns) != (source.size, source.mtime_ns):
                    raise ValueError(
                        f"input ({source.path}) changed while it was read. Run again with "
                        "--overwrite once it is complete."
                    )
        if not self.totals["documents"]:
            raise ValueError(f"input ({names}) has no documents. Nothing was written.")
        for spool in spools:
            if spool.tokens == 0:
                raise ValueError(
                    f"input ({names}): no document has a token, {spool.name} would be empty. "
                    "Nothing was written; see --json-keys."
                )
