import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_satformer.data.tokenizers.options import TokenizerOptions
from megatron_satformer.data.tokenizers.training import train_tokenizer
from tests.texts import source_texts, write_lines

ROOT = Path(__file__).resolve().parents[2]
# What tokenizers get wrong: spaces, line ends, bytes, combining and rare characters, markers.
ODD_TEXTS = (
    "  two  spaces and\ttab ",
    "\n\nlines\r\nand\rmore\n",
    "e\u0301 \u00e9 \ufb01 \u00bd \u2603 \u65e5\u672c\u8a9e \U0001f600",
    "nul \x00 and \x1f and \ufeff",
    "<s> </s> <unk> <0x0A> [INST]",
    "x" * 5000,
    "1234567890 3.14159",
    " ",
    "\n",
    "",
)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """About 400 documents of real text, of many lengths, with odd and empty ones between."""
    documents: list[str] = []
    for text in source_texts():
        parts = text.split("\n\n\n")
        documents += parts
    for index, odd in enumerate(ODD_TEXTS):
        documents.insert(7 * index, odd)
    return documents


@pytest.fixture(scope="session")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    return write_lines(path, [{"text": text, "title": text[:20]} for text in texts])


@pytest.fixture(scope="session")
def spm_model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    return str(train_tokenizer([corpus], folder, 1000).model)


@pytest.fixture(scope="session")
def spm(spm_model: str) -> TokenizerOptions:
    return TokenizerOptions("SentencePieceTokenizer", spm_model)


Tool = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def tool() -> Tool:
    """Runs tools/NAME.py with arguments, as a user does."""

    def run(name: str, *args: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, args)]
        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            command, capture_output=True, text=True, timeout=120, check=False, **options
        )

    return run


@pytest.fixture(scope="session")
def fails(tool: Tool) -> Callable[..., str]:
    """Runs a tool that must fail with exit code 2 and one line; returns the line."""

    def run(name: str, *args: object, **options: object) -> str:
        result = tool(name, *args, **options)
        lines = result.stderr.splitlines()
        assert result.returncode == 2, result
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("error: "), lines
        assert not result.stdout
        return lines[0]

    return run


def files_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


@pytest.fixture(scope="session")
def names() -> Callable[[Path], list[str]]:
    """The names in a folder, or none."""
    return files_in
