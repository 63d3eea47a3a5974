"""Documents to Megatron's indexed files: fast, in order, resumable, with bounded memory.

The output is byte for byte that of Megatron-LM's tools/preprocess_data.py for the same tokenizer
and input order, whatever the number of workers and however often the run was killed, and appears
only once it is complete. One thing differs: documents without a token are dropped, unless
`keep_empty` asks for Megatron's boundaries.
"""

import time

from megatron_satformer.data.datasets.indexed import check_output_free
from megatron_satformer.data.preprocess.encoding import ChunkEncoder
from megatron_satformer.data.preprocess.options import PreprocessOptions, PreprocessSummary
from megatron_satformer.data.preprocess.run_folder import RunFolder
from megatron_satformer.data.preprocess.tokenize_run import TokenizeRun
from megatron_satformer.data.reading.inputs import find_inputs


def preprocess(options: PreprocessOptions) -> PreprocessSummary:
    """Tokenizes the input into one data set per key, or continues where a run before was stopped.

    Raises:
        ValueError: If a file or a document is bad, or unfinished work there belongs to another
            input or other options. Nothing has the final names then.
    """
    start = time.perf_counter()
    sources = find_inputs(options.input, options.document_separator)
    if len(options.json_keys) > 1 and any(source.format == "txt" for source in sources):
        raise ValueError(
            f"json_keys ({' '.join(options.json_keys)}) must be one with plain text, which has no "
            "keys. Give one, to name the output."
        )
    with RunFolder(options) as folder:
        try:
            if "publishing" not in folder.state:
                for prefix in options.prefixes:
                    check_output_free(prefix, options.overwrite)
            encoder = ChunkEncoder(options)
            folder.take_up(sources)
            if "publishing" in folder.state:
                # Killed between two renames.
                folder.finish_publishing()
                summary = folder.state["summary"]
                resumed = summary["text_bytes"]
            else:
                summary, resumed = TokenizeRun(folder, sources, encoder).tokenize()
        except BaseException:
            if folder.is_empty() or options.reads_stdin:
                folder.remove()
            raise
    seconds = time.perf_counter() - start
    return PreprocessSummary(options.prefixes, **summary, resumed_bytes=resumed, seconds=seconds)
