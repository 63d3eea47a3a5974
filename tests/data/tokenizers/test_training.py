import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from megatron_satformer.data.tokenizers.exact import build_tokenizer
from megatron_satformer.data.tokenizers.options import TokenizerOptions
from megatron_satformer.data.tokenizers.training import sample_documents, train_tokenizer
from tests.texts import write_lines

ROOT = Path(__file__).resolve().parents[3]
FILES = ["tokenizer.json", "tokenizer_config.json"]


def test_special_ids_and_size(spm_model: str) -> None:
    model = SentencePieceProcessor(model_file=spm_model)
    assert model.get_piece_size() == 1000
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    assert [model.id_to_piece(index) for index in (0, 1, 2, 3)] == [
        "<unk>",
        "<s>",
        "</s>",
        "<0x00>",
    ]
    rows = Path(spm_model).with_suffix(".vocab").read_text("utf-8").splitlines()
    assert len(rows) == 1000


def test_text_round_trips(spm_model: str, texts: list[str]) -> None:
    model = SentencePieceProcessor(model_file=spm_model)
    for text in texts:
        ids = model.encode(text)
        assert model.unk_id() not in ids
        assert model.decode(ids) == text


def test_pieces_hold_spaces_and_paragraphs_but_do_not_span_lines(spm_model: str) -> None:
    model = SentencePieceProcessor(model_file=spm_model)
    pieces = [model.id_to_piece(index) for index in range(3, 1000)]
    assert "\n" in pieces
    assert "\n\n" in pieces
    assert "\u2581\u2581\u2581\u2581" in pieces  # indentation of code
    assert not [piece for piece in pieces if "\n" in piece.lstrip("\n")]


def test_the_same_input_gives_the_same_file(corpus: Path, spm_model: str, tmp_path: Path) -> None:
    again = train_tokenizer([corpus], tmp_path / "again.model", 1000)
    assert again.model == tmp_path / "again.model"
    assert again.model.read_bytes() == Path(spm_model).read_bytes()


def test_tool(corpus: Path, tmp_path: Path, tool: Callable, fails: Callable) -> None:
    args = ["--input", corpus, "--output", tmp_path / "out", "--vocab-size"]
    result = tool("train_tokenizer", *args, 500)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("500 pieces from ")
    assert not result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "tokenizer.model",
        "tokenizer.vocab",
    ]
    assert "tokenizer.model exists already. Pass --overwrite" in fails(
        "train_tokenizer", *args, 600
    )
    assert tool("train_tokenizer", *args, 600, "--overwrite").returncode == 0


def test_text_is_read_as_by_preprocess_data(corpus: Path, tmp_path: Path, tool: Callable) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = [json.loads(line)["text"] for line in corpus.read_text("utf-8").splitlines()[:60]]
    texts = [text for text in texts if text and "\r" not in text and "\n=\n" not in text]
    (folder / "a.TXT").write_bytes("\r\n=\r\n".join(texts).encode())
    (folder / "b.bin").write_bytes(b"\0")
    args = ["--input", folder, "--output", tmp_path / "out", "--vocab-size", 500]
    args += ["--document-separator", r"\n=\n", "--on-unknown", "skip"]
    result = tool("train_tokenizer", *args)
    assert result.returncode == 0, result.stderr
    assert f"500 pieces from {len(texts)} documents" in result.stdout
    assert result.stderr == f"note: {folder}/b.bin is not read: no text.\n"


def test_errors(corpus: Path, tmp_path: Path, fails: Callable, names: Callable) -> None:
    out, small, blank = tmp_path / "out", tmp_path / "small.jsonl", tmp_path / "blank.jsonl"
    small.write_text('{"text": "a few words, and a few more"}\n')
    blank.write_text('{"text": ""}\n')
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": 3}\n')
    cases = [
        (corpus, 259, "vocab_size (259) must be more than 259"),
        (corpus, 270, "vocab_size (270) must be at least "),
        (small, 4096, "vocab_size (4096) must be at most "),
        (blank, 300, "input must hold some text"),
        (bad, 300, f'{bad}, line 2: "text" must be a string'),
        (tmp_path / "none.jsonl", 300, "none.jsonl"),
    ]
    for source, size, message in cases:
        error = fails("train_tokenizer", "--input", source, "--vocab-size", size, "--output", out)
        assert message in error
        assert names(out) == []


def test_a_bad_line_keeps_its_message(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\nbroken\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: invalid JSON"):
        train_tokenizer([bad], tmp_path / "out", 300)


@pytest.fixture(scope="module")
def hf_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    output = tmp_path_factory.mktemp("hf") / "tokenizer"
    kind = "HuggingFaceTokenizer"
    return train_tokenizer([corpus], output, 1000, tokenizer_type=kind).model


def test_byte_level_text_round_trips(hf_folder: Path, texts: list[str]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf_folder, local_files_only=True)
    assert len(tokenizer) == 1000
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    odd = [*texts, "I'LL  don't\r\n\r\n\t 1234567", "\U0010ffff\u180e\u017f", "a<|endoftext|>b"]
    for text in odd:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    long = max(texts, key=len)
    assert len(tokenizer(long).input_ids) < 0.5 * len(long.encode())


def test_byte_level_is_megatrons_and_has_a_fast_equal(hf_folder: Path, texts: list[str]) -> None:
    pytest.importorskip("fastokens")
    from megatron_satformer.data.tokenizers.fast import fast_pipeline
    from tests.data.tokenizers.test_exact import assert_equal

    options = TokenizerOptions("HuggingFaceTokenizer", str(hf_folder))
    assert_equal(options, texts)
    reference = build_tokenizer(options)
    assert (reference.vocab_size, reference.eod) == (1000, 0)
    fast_pipeline(options, reference)


def test_the_same_input_gives_the_same_folder(
    corpus: Path, hf_folder: Path, tmp_path: Path
) -> None:
    train_tokenizer([corpus], tmp_path, 1000, tokenizer_type="HuggingFaceTokenizer")
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (hf_folder / name).read_bytes()


def test_byte_level_tool(
    corpus: Path, tmp_path: Path, tool: Callable, fails: Callable, names: Callable
) -> None:
    out, small, blank = tmp_path / "out", tmp_path / "small.jsonl", tmp_path / "blank.jsonl"
    write_lines(small, [{"text": "a few words, and a few more"}])
    write_lines(blank, [{"text": ""}])
    base = ["--tokenizer-type", "HuggingFaceTokenizer", "--output"]
    for source, size, output, message in (
        (corpus, 257, out, "vocab_size (257) must be more than 257"),
        (small, 4096, out, "vocab_size (4096) must be at most "),
        (blank, 300, out, "input must hold some text"),
        (corpus, 300, tmp_path / "x.json", "x.json) must be a folder with HuggingFaceTokenizer"),
    ):
        error = fails("train_tokenizer", "--input", source, "--vocab-size", size, *base, output)
        assert message in error
        assert names(out) == []
    args = ["--input", corpus, "--vocab-size", 400, "--max-bytes", 50_000, *base, out]
    result = tool("train_tokenizer", *args)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("400 pieces from ")
    assert " (0.0 MB) " in result.stdout
    assert names(out) == FILES
    assert "tokenizer.json exists already. Pass --overwrite" in fails("train_tokenizer", *args)
    assert tool("train_tokenizer", *args, "--overwrite").returncode == 0
    assert "max_bytes (0) must be at least 1" in fails(
        "train_tokenizer", *args, "--max-bytes", 0, "--overwrite"
    )


def test_a_killed_run_leaves_nothing_that_looks_whole(tmp_path: Path, names: Callable) -> None:
    # The input never ends, so the kill meets it in the middle.
    tool = str(ROOT / "tools" / "train_tokenizer.py")
    command = [sys.executable, tool, "--input", "-", "--vocab-size", "400", "--output", "out"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=tmp_path) as process:
        deadline = time.monotonic() + 60
        line = json.dumps({"text": "some words"}).encode() + b"\n"
        while not names(tmp_path / "out") and time.monotonic() < deadline:
            process.stdin.write(line)  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        process.send_signal(signal.SIGKILL)
    assert names(tmp_path / "out")
    assert all(name.endswith(".partial") for name in names(tmp_path / "out"))


def test_a_sample_is_bounded_fair_and_the_same_each_time() -> None:
    documents = [[f"{n:04}", "x" * (n % 7)] for n in range(4000)]
    sample = sample_documents(iter(documents), 7000)
    assert sample == sample_documents(iter(documents), 7000)
    assert sample == sorted(sample)
    sizes = [sum(map(len, document)) for document in sample]
    assert 6900 < sum(sizes) <= 7000
    # From everywhere, long and short: 1000 of 4000, so about 250 of each quarter.
    for quarter in range(4):
        found = sum(quarter * 1000 <= int(number) < quarter * 1000 + 1000 for number, _ in sample)
        assert 200 < found < 300
    assert 0.9 < sum(sizes) / len(sizes) / 7 < 1.1
    assert sample_documents(iter(documents), 10**6) == documents
    assert sample_documents(iter([["x" * 11], ["y"]]), 10) == [["y"]]
