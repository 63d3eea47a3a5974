import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_satformer.data.reading.chunks import read_chunks
from megatron_satformer.data.reading.documents import Rejected, build_reader, read_documents
from megatron_satformer.data.reading.inputs import find_inputs

arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
ipc = pytest.importorskip("pyarrow.ipc")
TEXTS = [f"{number} Grüße " + "x" * (number * 37 % 300) for number in range(200)]


def write(path: Path, table: Any, rows: int = 70) -> Path:
    """Writes a table as its name says: .parquet, .arrow (a stream) or .file.arrow."""
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=rows)
    else:
        new = ipc.new_file if path.name.endswith(".file.arrow") else ipc.new_stream
        with path.open("wb") as file, new(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    return path


def read(path: Path, keys: list[str]) -> list[list[str]]:
    return list(read_documents(find_inputs([path]).sources, keys))


NAMES = ["a.parquet", "a.arrow", "a.file.arrow"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "kind",
    [
        *("string", "large_string", "string_view", "binary", "large_binary", "binary_view"),
        *("dictionary", "dictionary of binary"),
    ],
)
def test_every_type_of_text_is_read(name: str, kind: str, tmp_path: Path) -> None:
    column = arrow.array(TEXTS)
    if kind.startswith("dictionary"):
        values = column.cast(arrow.binary()) if "binary" in kind else column
        column = values.dictionary_encode()
    elif "binary" in kind:
        column = column.cast(arrow.binary()).cast(getattr(arrow, kind)())
    else:
        column = column.cast(getattr(arrow, kind)())
    path = write(tmp_path / name, arrow.table({"n": range(len(TEXTS)), "text": column}))
    assert read(path, ["text"]) == [[text] for text in TEXTS]
    sources = find_inputs([path]).sources
    for chunk_bytes in (1, 333, 1 << 20):
        chunks = list(read_chunks(sources, ["text"], None, chunk_bytes))
        assert [row[0].decode() for chunk in chunks for row in chunk.content] == TEXTS
        assert sum(chunk.text_bytes for chunk in chunks) == sum(len(t.encode()) for t in TEXTS)
        assert 0.9 < sum(chunk.file_bytes for chunk in chunks) / path.stat().st_size <= 1


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_text_is_named_by_its_type_before_a_row_is_read(
    name: str, tmp_path: Path
) -> None:
    columns = {
        "number": (arrow.array([1, 2]), "int64"),
        "list": (arrow.array([["a"], []]), r"list<\w+: string>"),
        "struct": (arrow.array([{"a": "b"}, None]), r"struct<a: string>"),
        "digest": (arrow.array([b"ab", b"cd"], arrow.binary(2)), r"fixed_size_binary\[2\]"),
        # Parquet keeps dictionaries of text alone.
        "codes": (arrow.array([1, 1]).dictionary_encode(), "(dictionary<values=)?int64"),
    }
    table = arrow.table({"text": ["a", "b"], **{key: array for key, (array, _) in columns.items()}})
    path = write(tmp_path / name, table)
    group = "row group 1, " if path.suffix == ".parquet" else ""
    good = write(tmp_path / f"good-{name}", arrow.table({"text": ["a"], "list": ["b"]}))
    for key, (_, kind) in columns.items():
        expected = (
            rf"input \({path}\) must have text in column {key}; it is {kind}.* throughout, from "
            rf"{group}row 1\. See --json-keys; columns of text: text\."
        )
        with pytest.raises(ValueError, match=expected):
            read(path, ["text", key])
    with pytest.raises(ValueError, match=r"has no column body \(it has text, number, list, str"):
        read(path, ["body"])
    # Also of a later file, before the first chunk of an earlier one.
    with pytest.raises(ValueError, match=f"{path}.* must have text in column list"):
        next(read_chunks(find_inputs([good, path]).sources, ["text", "list"]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["string", "binary"])
def test_a_bad_row_is_named_with_its_row_group_and_the_others_are_read(
    name: str, kind: str, tmp_path: Path
) -> None:
    raw = [b"good", b"b\xffd", None, b"fine"] * 30
    column = arrow.array(raw, arrow.binary())
    if kind == "string":
        column = arrow.Array.from_buffers(arrow.string(), len(raw), column.buffers())
    path = write(tmp_path / name, arrow.table({"text": column}), rows=1 if kind == "binary" else 50)
    group = {"binary": " (row group 2)", "string": " (row group 1)"}[kind]
    group = group if path.suffix == ".parquet" else ""
    with pytest.raises(ValueError, match="Correct or remove it") as error:
        read(path, ["text"])
    what = '"text" has invalid UTF-8 (byte 2: invalid start byte)'
    assert str(error.value) == f"{path}, row 2{group}: {what}. Correct or remove it."
    (chunk,) = read_chunks(find_inputs([path]).sources, ["text"])
    found = list(build_reader(["text"])(chunk))
    assert [one for one in found if not isinstance(one, Rejected)] == [["good"], ["fine"]] * 30
    rejected = [one for one in found if isinstance(one, Rejected)]
    assert rejected[0].excerpt == "b\ufffdd"
    assert [one.reason for one in rejected[:2]] == [what, '"text" must be a string, not null']


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    for name in NAMES:
        path = write(tmp_path / name, arrow.table({"text": TEXTS}))
        whole = path.read_bytes()
        for end in (len(whole) // 2, len(whole) - 8, 3):
            path.write_bytes(whole[:end])
            with pytest.raises(ValueError, match="is damaged or"):
                read(path, ["text"])


MEASURE = """
import resource, sys
from megatron_satformer.data.reading.chunks import read_chunks
from megatron_satformer.data.reading.inputs import find_inputs
import pyarrow.parquet
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
path, *keys = sys.argv[1:]
for key in keys:
    try:
        for chunk in read_chunks(find_inputs([path]).sources, [key]):
            pass
    except ValueError as error:
        print(error)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_multiply(tmp_path: Path) -> None:
    rows = 20_000
    path = tmp_path / "a.parquet"
    lists = arrow.array(range(0, 400 * (rows + 1), 400), arrow.int32())
    table = arrow.table(
        {
            "text": ["x" * 100] * rows,
            # 64 MB of numbers, which are 600 as objects.
            "tokens": arrow.ListArray.from_arrays(lists, arrow.array(range(400 * rows))),
            # 2 GB once unfolded, and next to nothing on disk.
            "same": arrow.DictionaryArray.from_arrays(
                arrow.array([0] * rows, arrow.int32()), arrow.array(["y" * 100_000])
            ),
        }
    )
    parquet.write_table(table, path)
    command = [sys.executable, "-c", MEASURE, str(path), "text", "tokens", "same"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    refused, grown = result.stdout.splitlines()
    assert "must have text in column tokens; it is list<" in refused
    assert int(grown) < 300_000, "KiB"


def test_rejected_rows_carry_their_row_group(tmp_path: Path) -> None:
    from megatron_satformer.data.preprocess.main import preprocess
    from megatron_satformer.data.preprocess.options import PreprocessOptions
    from megatron_satformer.data.tokenizers.options import TokenizerOptions

    raw = [b"1 2", b"\xff", b"3"] * 2
    path = write(tmp_path / "a.parquet", arrow.table({"text": raw}), rows=3)
    options = PreprocessOptions(
        [path], tmp_path / "x", TokenizerOptions("NullTokenizer", None, 10), on_error="skip"
    )
    summary = preprocess(options)
    assert (summary.documents, summary.rejected_documents) == (4, 2)
    lines = (tmp_path / "x.rejects.jsonl").read_text().splitlines()
    assert [(one["row"], one["row_group"]) for one in map(json.loads, lines)] == [(2, 1), (5, 2)]
