"""Downloads documents of a Hugging Face dataset as JSON lines, up to a number of tokens.

Killed at any moment, the same command goes on; with more --tokens it goes on, too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.cli import ToolParser, add_flags_of, run_tool
from megatron_satformer.data.download import DownloadOptions, download
from megatron_satformer.sizes import token_count


def main() -> None:
    """Parses the flags and downloads."""
    parser = ToolParser(description=__doc__)
    names = "dataset name split revision text_column token_column bytes_per_token tokens"
    names += " shard_bytes output overwrite"
    add_flags_of(parser, DownloadOptions, *names.split(), tokens={"type": token_count})
    options = DownloadOptions(**vars(parser.parse_args()))
    done = download(options)
    counted = f", {done.tokens:,} tokens" if options.tokens is not None else ""
    print(
        f"{done.documents:,} documents{counted}, {done.bytes / 1e9:.3f} GB in {done.shards} files "
        f"({done.documents - done.resumed:,} documents now, {done.seconds:.1f} s): {options.output}"
    )
    if done.exhausted and done.tokens < (options.tokens or 0):
        print(
            f"WARNING: tokens ({options.tokens:,}) are more than the dataset has: "
            f"{done.tokens:,}. All of it is here.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_tool(main)
