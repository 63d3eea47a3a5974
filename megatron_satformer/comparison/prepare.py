"""The data of a comparison, made by the tools of this repository where they are not there yet."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_satformer.quickstart.process import REPOSITORY

VOCAB_SIZE = 4096
TRAIN_EXAMPLES, TEST_EXAMPLES = 20_000, 500
WORDS = 1024  # of the vocabulary of retrieval tasks


def build_corpus(root: Path) -> dict[str, str]:
    """Shakespeare and Milton, tokenized; returns what `tasks.text_task` takes of it."""
    corpus, tokenizer = root / "corpus", root / "tokenizer"
    text, model = corpus / "corpus.jsonl", tokenizer / "tokenizer.model"
    prefix = root / "tokens" / "corpus"
    make(corpus, f"tools/build_demo_corpus.py --output {corpus}")
    size = f"--vocab-size {VOCAB_SIZE}"
    make(tokenizer, f"tools/train_tokenizer.py --input {text} --output {tokenizer} {size}")
    flags = f"--append-eod --tokenizer-type SentencePieceTokenizer --tokenizer-model {model}"
    data = Path(f"{prefix}_text_document")
    make(
        data.with_suffix(".idx"),
        f"tools/preprocess_data.py --input {text} --output-prefix {prefix} {flags}",
    )
    return {
        "data_path": str(data),
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": str(model),
    }


def build_retrieval(
    root: Path, tasks: Sequence[str], length: int, train: int = TRAIN_EXAMPLES
) -> Path:
    """Retrieval tasks of one length; returns their folder.

    Args:
        root: folder of the comparison.
        tasks: their names.
        length: tokens of an example.
        train: examples to train on; fewer steps need fewer.
    """
    folder = root / f"retrieval_{length}_{train}_{'_'.join(tasks)}"
    flags = f"--tasks {' '.join(tasks)} --lengths {length} --train {train}"
    flags += f" --valid {TEST_EXAMPLES} --test {TEST_EXAMPLES} --vocab-size {WORDS}"
    make(folder, f"tools/make_retrieval_data.py --save {folder} {flags}")
    return folder


def make(target: Path, command: str) -> None:
    """Runs a tool unless what it makes is there: tools publish whole or not at all.

    Raises:
        ValueError: with what the tool said, if it fails.
    """
    if target.exists():
        return
    tool, *flags = command.split()
    tqdm.write(f"making {target.name}")
    done = subprocess.run(
        [sys.executable, tool, *flags], cwd=REPOSITORY, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"{tool} could not make {target}: {done.stderr.strip()[-2000:]}")
