import bz2
import gzip
import json
import os
from pathlib import Path

import pytest

from megatron_satformer.data.reading.inputs import Source, find_inputs

LINE = b'{"text": "a"}\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inner = tmp_path / "corpus" / "inner"
    inner.mkdir(parents=True)
    (inner / ".cache").mkdir()
    (tmp_path / "corpus" / "x.partial").mkdir()
    for name in (".cache/f.jsonl", "x.manifest.json", "x.rejects.jsonl", "x.partial/run.json"):
        (inner.parent / name if name[0] == "x" else inner / name).write_text("not data")
    for name in ("x_text_document.bin", "x_text_document.idx", "README.md", "config.json"):
        (tmp_path / "corpus" / name).write_text("not data")
    for name in ("b.jsonl", "a.json", "inner/d.NDJSON"):
        (tmp_path / "corpus" / name).write_bytes(LINE)
    (inner / "c.jsonl.gz").write_bytes(gzip.compress(LINE))
    (tmp_path / "corpus" / "e.parquet").write_bytes(b"looked into when it is read")
    return tmp_path / "corpus"


def sources_of(*values: object, separator: str | None = None) -> list[Source]:
    return find_inputs([str(value) for value in values], separator).sources


def names_of(*values: object) -> list[str]:
    return [Path(source.path).name for source in sources_of(*values)]


def test_a_folder_gives_what_it_holds_sorted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = sources_of(folder)
    names = ["a.json", "b.jsonl", "e.parquet", "inner/c.jsonl.gz", "inner/d.NDJSON"]
    assert [source.path for source in sources] == [str(folder / name) for name in names]
    assert [source.format for source in sources] == ["jsonl", "jsonl", "parquet", "jsonl", "jsonl"]
    assert [source.compression for source in sources] == [None, None, None, "gzip", None]
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: 8 beside the data are not read, being metadata, hidden or empty:")


def test_a_folder_of_any_spelling_is_read_whole(tmp_path: Path) -> None:
    corpus, linked = tmp_path / "corpus", tmp_path / "linked"
    corpus.mkdir()
    linked.mkdir()
    for name in ("a.jsonl", "c.JSONL", "part-00000"):
        (corpus / name).write_bytes(LINE)
    (corpus / "e.jsonl.bz2").write_bytes(bz2.compress(LINE))
    (corpus / "f.JSONL.GZ").write_bytes(gzip.compress(LINE))
    (corpus / "packed").write_bytes(gzip.compress(LINE))
    (linked / "d.jsonl").write_bytes(LINE)
    (corpus / "sub").symlink_to(linked)
    expected = ["a.jsonl", "c.JSONL", "e.jsonl.bz2", "f.JSONL.GZ", "packed", "part-00000"]
    assert names_of(corpus) == [*expected, "d.jsonl"]


def test_links_are_followed_once_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "inner").mkdir(parents=True)
    (corpus / "inner" / "a.jsonl").write_bytes(LINE)
    (corpus / "inner" / "up").symlink_to(corpus)
    (corpus / "z.jsonl").symlink_to("inner/a.jsonl")
    found = find_inputs([corpus])
    assert [source.path for source in found.sources] == [str(corpus / "inner" / "a.jsonl")]
    assert [one.path for one in found.unread] == [
        str(corpus / "inner" / "up"),
        str(corpus / "z.jsonl"),
    ]
    assert capsys.readouterr().err.splitlines() == [
        f"note: {corpus}/inner/up is not read: the same as {corpus}, which is read.",
        f"note: {corpus}/z.jsonl is not read: the same as {corpus}/inner/a.jsonl, which is read.",
    ]


UNKNOWN = {
    "a.bin": (b"\x00\x01\x02\xff" * 9, "no text"),
    "b.csv": (b"one,two\n1,2\n", "plain text"),
    "c.jsonl": ('{"text": "a"}\n'.encode("utf-16"), "UTF-16 text: convert it with iconv"),
    "d.txt": ("wide".encode("utf-16-le"), "UTF-16 text"),
    "e.zip": (b"PK\x03\x04" + b"x" * 40, "a zip archive: unpack it"),
    "f.json": (b'[{"text": "a"},\n {"text": "b"}]\n', "one JSON array, not a JSON object per line"),
    "g.json": (b'{\n  "text": "a"\n}\n', "one JSON object over several lines"),
    "h.json.gz": (gzip.compress(b'[\n{"text": "a"}]'), "one JSON array"),
    "i.parquet.gz": (gzip.compress(b"PAR1"), "parquet in gzip: decompress it"),
    "j.tar.gz": (gzip.compress(b"\0" * 257 + b"ustar" + b"\0" * 250), "a tar archive"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_read_is_named_or_skipped_with_a_word(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, reason = UNKNOWN[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.jsonl").write_bytes(LINE)
    for values in ([tmp_path], [f"{tmp_path}/*"]):
        with pytest.raises(ValueError, match="holds 1 that would not be read") as error:
            find_inputs(values)
        assert f"{tmp_path / name} ({reason}" in str(error.value)
        assert "pass --on-unknown skip" in str(error.value)
        assert not capsys.readouterr().err
        found = find_inputs(values, on_unknown="skip")
        assert [source.path for source in found.sources] == [str(tmp_path / "good.jsonl")]
        (note,) = capsys.readouterr().err.splitlines()
        assert note.startswith(f"note: {tmp_path / name} is not read: {reason}")
        assert [one.path for one in found.unread] == [str(tmp_path / name)]
    # One that is named is meant: nothing lets it pass.
    with pytest.raises(ValueError, match="is of a kind that is not read"):
        find_inputs([tmp_path / name], on_unknown="skip")


def test_data_by_the_name_of_metadata_are_read(tmp_path: Path) -> None:
    for name in ("license.jsonl", "README.jsonl", "config.jsonl", "state.json.gz"):
        (tmp_path / name).write_bytes(LINE)
    (tmp_path / "README.txt").write_bytes(LINE)
    with pytest.raises(ValueError, match=r"state\.json\.gz\) is damaged"):
        find_inputs([tmp_path])
    (tmp_path / "state.json.gz").write_bytes(gzip.compress(LINE))
    assert names_of(tmp_path) == ["README.jsonl", "config.jsonl", "license.jsonl", "state.json.gz"]


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "good.jsonl").write_bytes(LINE)
    with pytest.raises(ValueError, match=r"gone\.jsonl \(a link to nothing\)"):
        find_inputs([tmp_path])


def test_globs_are_sorted_and_the_order_given_is_kept(folder: Path) -> None:
    assert names_of(folder / "inner" / "*", folder / "b.jsonl") == [
        "c.jsonl.gz",
        "d.NDJSON",
        "b.jsonl",
    ]
    assert len(sources_of(f"{folder}/**/*.gz")) == 1
    # A folder that matches is searched through, as it is when the shell expands the glob.
    assert names_of(f"{folder}/*") == names_of(f"{folder}/**/*") == names_of(folder)


def test_standard_input_is_lines_or_text() -> None:
    assert sources_of("-")[0].format == "jsonl"
    assert sources_of("-", separator="\n\n")[0].format == "txt"


def test_any_other_name_is_read_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "corpus.dat"
    for content, separator, expected in (
        (LINE, None, "jsonl"),
        (b"\xef\xbb\xbf\n" + LINE, None, "jsonl"),
        (b'{"text": "' + b"a" * 100_000 + b'"}', None, "jsonl"),
        (b"PAR1", None, "parquet"),
        ("Grüße".encode(), "\n\n", "txt"),
        (b"", None, "jsonl"),
    ):
        path.write_bytes(content)
        assert sources_of(path, separator=separator)[0].format == expected
    (tmp_path / "one.json").write_text(json.dumps({"text": "a"}))
    assert sources_of(tmp_path / "one.json")[0].format == "jsonl"


def test_bad_inputs_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").touch()
    (tmp_path / "link.jsonl").symlink_to(folder / "b.jsonl")
    os.mkfifo(tmp_path / "pipe")
    cases = [
        ([], "names no file"),
        ([tmp_path / "none.jsonl"], r"none\.jsonl\) does not exist"),
        ([tmp_path / "*.none"], "matches no file"),
        ([tmp_path / "empty"], "a folder without a file to read"),
        ([tmp_path / "pipe"], "must be a regular file. Pipe it, with --input -"),
        ([folder / "b.jsonl", folder / "*.jsonl"], "is named twice"),
        ([folder / "b.jsonl", tmp_path / "link.jsonl"], "is named twice"),
        (["-", folder / "b.jsonl"], r"input \(-\) must be the only one"),
        ([tmp_path / "a.txt"], "--document-separator"),
    ]
    for values, message in cases:
        with pytest.raises(ValueError, match=message):
            find_inputs(values)
    assert sources_of(tmp_path / "a.txt", separator="")[0].format == "txt"
    with pytest.raises(ValueError, match=r"on_unknown \(stop\) must be one of error, skip"):
        find_inputs([folder], on_unknown="stop")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(folder: Path) -> None:
    (folder / "b.jsonl").chmod(0)
    for values in ([folder / "b.jsonl"], [folder]):
        with pytest.raises(ValueError, match="cannot be read"):
            find_inputs(values)
