import os
from pathlib import Path

import pytest

from megatron_satformer.data.reading.inputs import find_inputs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inner = tmp_path / "corpus" / "inner"
    inner.mkdir(parents=True)
    (inner / ".cache").mkdir()
    (tmp_path / "corpus" / "x.partial").mkdir()
    for name in (".cache/f.jsonl", "x.manifest.json", "x.rejects.jsonl", "x.partial/run.json"):
        (inner.parent / name if name[0] == "x" else inner / name).write_text("not data")
    for name in ("b.jsonl", "a.json", "inner/c.jsonl.gz", "inner/d.jsonl.zst", "e.parquet"):
        (tmp_path / "corpus" / name).write_bytes(b"x")
    (tmp_path / "corpus" / "README.md").write_text("not data")
    (tmp_path / "corpus" / "weights.bin").write_text("not data")
    return tmp_path / "corpus"


def test_a_folder_gives_what_it_holds_sorted(folder: Path) -> None:
    sources = find_inputs([folder])
    names = ["a.json", "b.jsonl", "e.parquet", "inner/c.jsonl.gz", "inner/d.jsonl.zst"]
    assert [source.path for source in sources] == [str(folder / name) for name in names]
    assert [source.format for source in sources] == ["jsonl", "jsonl", "parquet", "jsonl", "jsonl"]
    assert [source.compression for source in sources] == [None, None, None, "gzip", "zstd"]


def test_globs_are_sorted_and_the_order_given_is_kept(folder: Path) -> None:
    sources = find_inputs([folder / "inner" / "*", folder / "b.jsonl"])
    assert [Path(source.path).name for source in sources] == [
        "c.jsonl.gz",
        "d.jsonl.zst",
        "b.jsonl",
    ]
    assert len(find_inputs([f"{folder}/**/*.gz"])) == 1


def test_standard_input_is_lines_or_text() -> None:
    assert find_inputs(["-"])[0].format == "jsonl"
    assert find_inputs(["-"], "\n\n")[0].format == "txt"


def test_any_other_name_is_json_lines_as_in_megatron_lm(tmp_path: Path) -> None:
    (tmp_path / "corpus.dat").write_text("{}")
    assert find_inputs([tmp_path / "corpus.dat"])[0].format == "jsonl"


def test_bad_inputs_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").touch()
    (tmp_path / "link.jsonl").symlink_to(folder / "b.jsonl")
    cases = [
        ([], "names no file"),
        ([tmp_path / "none.jsonl"], r"none\.jsonl\) does not exist"),
        ([tmp_path / "*.none"], "matches no file"),
        ([tmp_path / "empty"], "a folder without a file to read"),
        ([folder / "weights.bin"], r"weights\.bin\) is of a kind that is not read"),
        ([folder / "b.jsonl", folder / "*.jsonl"], "is named twice"),
        ([folder / "b.jsonl", tmp_path / "link.jsonl"], "is named twice"),
        (["-", folder / "b.jsonl"], r"input \(-\) must be the only one"),
        ([tmp_path / "a.txt"], "--document-separator"),
    ]
    for values, message in cases:
        with pytest.raises(ValueError, match=message):
            find_inputs(values)
    assert find_inputs([tmp_path / "a.txt"], "")[0].format == "txt"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(folder: Path) -> None:
    (folder / "b.jsonl").chmod(0)
    with pytest.raises(ValueError, match="cannot be read"):
        find_inputs([folder / "b.jsonl"])
