from collections.abc import Callable
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from megatron_satformer.data.train_tokenizer import train_tokenizer


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
        (tmp_path / "none.jsonl", 300, "does not exist"),
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
