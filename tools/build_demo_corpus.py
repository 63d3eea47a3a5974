"""Makes the demonstration corpus: Shakespeare and Milton, one JSON line per section."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_satformer.cli import ToolParser, run_tool
from megatron_satformer.data.demo_corpus import SDIST, build_demo_corpus


def _parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--output", required=True, help="Folder that gets corpus.jsonl.")
    parser.add_argument("--sdist", help=f"{SDIST}, fetched before; for use without a network.")
    return parser


def main() -> None:
    """Parses the flags and makes the corpus."""
    args = _parser().parse_args()
    corpus = build_demo_corpus(args.output, args.sdist)
    print(
        f"{corpus.documents} documents of {corpus.works} works ({corpus.text_bytes / 1e6:.1f} MB) "
        f"{'found complete' if corpus.reused else 'made'} in {corpus.seconds:.1f} s: {corpus.path}"
    )


if __name__ == "__main__":
    run_tool(main)
