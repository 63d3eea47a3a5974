import gzip
import io
import json
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
    sources = find_inputs(paths, separator)
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
            assert [t for [t] in read_documents(find_inputs([path]), ["text"])] == TEXTS
        else:
            assert read([path], chunk_bytes) == TEXTS, path
    assert read([tmp_path / "a.jsonl", tmp_path / "c.jsonl.zst"], chunk_bytes) == TEXTS * 2


@given(
    st.text(alphabet="ab\n", max_size=60),
    st.sampled_from(["\n\n", "\n", "ab", "aba", ""]),
    st.integers(1, 20),
)
def test_text_is_cut_at_separators_as_by_split(
    tmp_path_factory: pytest.TempPathFactory, text: str, separator: str, chunk_bytes: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "text.txt"
    path.write_text(text)
    pieces = text.split(separator) if separator else [text]
    expected = pieces if pieces[-1] else pieces[:-1]
    chunks = read_chunks(find_inputs([path], separator), ["text"], separator, chunk_bytes)
    assert [raw.decode() for chunk in chunks for raw in chunk.content] == expected


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"".join(LINES)))
    monkeypatch.setattr("sys.stdin", stdin)
    chunks = list(read_chunks(find_inputs(["-"]), ["text"], None, 100))
    assert [line + b"\n" for chunk in chunks for line in chunk.content] == LINES


def test_damaged_files_are_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    whole = b'{"text": "a"}\n' * 1000
    cases = {
        "a.jsonl.gz": (gzip.compress(whole)[:-20], "is damaged or cannot be read to its end"),
        "b.jsonl.gz": (b"no gzip at all", "is damaged"),
        "c.jsonl.zst": (zstandard.compress(whole)[:-5], "the last zstd frame is cut short"),
        "d.jsonl.zst": (b"no zstd at all", "is damaged"),
        "e.parquet": (b"no parquet at all", "is damaged or no Parquet file"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            list(read_chunks(find_inputs([path]), ["text"]))
        assert str(path) in str(error.value)


def test_parquet_columns_are_checked(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": ["a", None, "c"], "n": [1, 2, 3]}), path)
    with pytest.raises(ValueError, match=r"has no column body \(it has text, n\)"):
        list(read_documents(find_inputs([path]), ["body"]))
    with pytest.raises(ValueError, match=r'row 2: "text" must be a string, not null'):
        list(read_documents(find_inputs([path]), ["text"]))
    with pytest.raises(ValueError, match=r'row 1: "n" must be a string, not a number'):
        list(read_documents(find_inputs([path]), ["n"]))
