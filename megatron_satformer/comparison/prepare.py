"""The data of a comparison, made by the tools of this repository where they are not there yet."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_satformer.quickstart.process import REPOSITORY

VOCAB_SIZE = 4096
TRAIN_EXAMPLES, TEST_EXAMPLES = 100_000, 500


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


@dataclass(frozen=True)
class RetrievalOptions:
    """What retrieval tasks are trained on; the defaults are what the size tiny begins to learn.

    Attributes:
        retrieval_tasks: To train on, each by itself.
        retrieval_length: Tokens of an example; a divisor of the size's sequence length.
        retrieval_words: Words of the vocabulary.
        pairs: Of mqar: keys and values, each asked for once.
        power_a: Of mqar, as make_retrieval_data.py has it.
    """

    retrieval_tasks: tuple[str, ...] = ("mqar",)
    retrieval_length: int = 32
    retrieval_words: int = 32
    pairs: int = 4
    power_a: float = 1.0

    def build(self, root: Path, seq_length: int, samples: int | None) -> Path:
        """Makes the tasks; returns their folder.

        Args:
            root: folder of the comparison.
            seq_length: tokens of a sample.
            samples: that are trained on; None for as many as time allows.

        Raises:
            ValueError: if no whole number of examples fits a sample, or tasks cannot be made so.
        """
        length = self.retrieval_length
        if length < 1 or seq_length % length:
            raise ValueError(
                f"retrieval_length ({length}) must divide the size's sequence length "
                f"({seq_length})."
            )
        train = samples * (seq_length // length) if samples else TRAIN_EXAMPLES
        how = f"{self.retrieval_words}_{self.pairs}_{self.power_a:g}"
        folder = root / f"retrieval_{length}_{train}_{how}_{'_'.join(self.retrieval_tasks)}"
        flags = f"--tasks {' '.join(self.retrieval_tasks)} --lengths {length} --train {train}"
        flags += f" --valid {TEST_EXAMPLES} --test {TEST_EXAMPLES}"
        flags += f" --vocab-size {self.retrieval_words} --pairs {self.pairs}"
        make(
            folder, f"tools/make_retrieval_data.py --save {folder} {flags} --power-a {self.power_a}"
        )
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
