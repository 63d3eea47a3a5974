import gzip
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_satformer.data.reading.chunks import read_chunks
from megatron_satformer.data.reading.documents import Rejected, build_reader, read_documents
from megatron_satformer.data.reading.inputs import find_inputs

zstandard = pytest.importorskip("zstandard")
TEXTS = [f"{number} " + "x" * (number * 37 % 300) + "\u00e9\n" for number in range(200)]
LINES = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]


def read(paths: list[Path], chunk_bytes: int, separator: str | None = None) -> list[str]:
    sources = find_inputs(paths, separator).sources
    documents = build_reader(["text"])
    texts = []
    used = 0
    for chunk in read_chunks(sources, ["text"], separator, chunk_bytes):
        used += chunk.file_bytes
        for found in documents(chunk):
            assert not isinstance(found, Rejected)
            texts += found
    assert used == sum(path.stat().st_size for path in paths)
    return texts


@pytest.mark.parametrize("chunk_bytes", [1, 100, 333, 1 << 20])
def test_every_kind_of_file_gives_every_document_once(tmp_path: Path, chunk_bytes: int) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    whole = b"".join(LINES)
    half = len(whole) // 2
    contents = {
        "a.jsonl": whole.rstrip(),
        "b.jsonl.gz": gzip.compress(whole[:half]) + gzip.compress(whole[half:]),
        "c.jsonl.zst": zstandard.compress(whole[:half]) + zstandard.compress(whole[half:]),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    table = arrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    parquet.write_table(table, tmp_path / "d.parquet", row_group_size=70)
    for path in sorted(tmp_path.iterdir()):
        if path.suffix == ".parquet":
            # The share of the file that a batch took is rounded.
            assert [t for [t] in read_documents(find_inputs([path]).sources, ["text"])] == TEXTS
        else:
            assert read([path], chunk_bytes) == TEXTS, path
    assert read([tmp_path / "a.jsonl", tmp_path / "c.jsonl.zst"], chunk_bytes) == TEXTS * 2


@given(
    st.text(alphabet="ab\r\n", max_size=60),
    st.sampled_from(["\n\n", "\n", "ab", "aba", "a\nb", "\r\n\r\n", "\n--\n", ""]),
    st.integers(1, 20),
)
def test_text_is_cut_at_separators_as_by_split(
    tmp_path_factory: pytest.TempPathFactory, text: str, separator: str, chunk_bytes: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "text.txt"
    path.write_bytes(text.encode())
    # A line end of the separator is LF or CRLF in the text, whichever comes first.
    either = re.escape(separator.replace("\r\n", "\n")).replace("\\\n", "\r?\n")
    pieces = re.split(either, text) if separator else [text]
    expected = pieces if pieces[-1] else pieces[:-1]
    chunks = read_chunks(find_inputs([path], separator).sources, ["text"], separator, chunk_bytes)
    assert [raw.decode() for chunk in chunks for raw in chunk.content] == expected


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"".join(LINES)))
    monkeypatch.setattr("sys.stdin", stdin)
    chunks = list(read_chunks(find_inputs(["-"]).sources, ["text"], None, 100))
    assert [line + b"\n" for chunk in chunks for line in chunk.content] == LINES


def test_damaged_files_are_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    whole = b'{"text": "a"}\n' * 1000
    cases = {
        "a.jsonl.gz": (gzip.compress(whole)[:-20], "is damaged or cannot be read to its end"),
        "b.jsonl.gz": (b"no gzip at all", "is damaged"),
        "c.jsonl.zst": (zstandard.compress(whole)[:-5], "its last part is cut short"),
        "d.jsonl.zst": (b"no zstd at all", "is damaged"),
        "e.parquet": (b"no parquet at all", "is damaged or no Parquet file"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            list(read_chunks(find_inputs([path]).sources, ["text"]))
        assert str(path) in str(error.value)


def test_a_byte_order_mark_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = b"\xef\xbb\xbf"
    for name, content in {
        "a.jsonl": mark + LINES[0],
        "b.jsonl.gz": gzip.compress(mark + LINES[0]),
        "c": mark + LINES[0],
        "d.txt": mark + TEXTS[0].encode(),
    }.items():
        (tmp_path / name).write_bytes(content)
        for chunk_bytes in (1, 1 << 20):
            assert read([tmp_path / name], chunk_bytes, "") == TEXTS[:1], name
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(mark + LINES[0])))
    assert [text for [text] in read_documents(find_inputs(["-"]).sources, ["text"])] == TEXTS[:1]
    # Inside a file it is a character like others.
    (tmp_path / "d.txt").write_bytes(b"a\n" + mark + b"b")
    assert read([tmp_path / "d.txt"], 100, "\n") == ["a", "\ufeffb"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"x", mtime=0), r"input \(-\) is compressed \(gzip\)"),
        ('{"text": "a"}'.encode("utf-16"), r"input \(-\) is UTF-16 text: convert it"),
    ],
)
def test_standard_input_of_another_kind_is_named(
    content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    with pytest.raises(ValueError, match=message):
        list(read_chunks(find_inputs(["-"]).sources, ["text"]))


def test_a_separator_that_does_not_occur_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / f"{name}.txt" for name in "abc"]
    for path, content in zip(paths, ("one\r\n\r\ntwo", "one\ntwo", "one"), strict=True):
        path.write_bytes(content.encode())
    assert read(paths[:1], 100, "\n\n") == ["one", "two"]
    assert read(paths[1:2], 100, "") == ["one\ntwo"]
    assert not capsys.readouterr().err
    assert read(paths, 100, "\n\n") == ["one", "two", "one\ntwo", "one"]
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(
        f"WARNING: document_separator ('\\n\\n') occurs nowhere in {paths[1]} and 1 more of 3 files"
    )
