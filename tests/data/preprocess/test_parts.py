"""A data set made in parts, killed, continued and merged, is what one run makes."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_satformer.data.datasets.merge import merge_datasets
from megatron_satformer.data.preprocess.main import preprocess
from megatron_satformer.data.preprocess.options import PreprocessOptions
from megatron_satformer.data.preprocess.run_folder import RunFolder
from megatron_satformer.data.tokenizers.options import TokenizerOptions

NUM_PARTS = 4


@pytest.fixture
def options(corpus: Path, spm: TokenizerOptions, tmp_path: Path) -> PreprocessOptions:
    """Of one run over files that can be cut and one that cannot, with bad lines among them."""
    folder = tmp_path / "input"
    folder.mkdir()
    lines = corpus.read_bytes()[:200_000].splitlines(keepends=True)[:-1]
    bad = [json.dumps({"title": "no text"}).encode() + b"\n"]
    (folder / "a.jsonl").write_bytes(b"".join(lines[:10] + bad + lines[10:60] + bad + lines[60:]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:20] + bad)))
    (folder / "c.jsonl").write_bytes(b"".join(lines[30:70]))
    return PreprocessOptions(
        [folder],
        tmp_path / "one",
        spm,
        append_eod=True,
        on_error="skip",
        workers=1,
        chunk_bytes=10_000,
    )


def part_of(options: PreprocessOptions, part: int, **changes: object) -> PreprocessOptions:
    prefix = Path(options.output_prefix).with_name("all")
    return replace(options, output_prefix=prefix, num_parts=NUM_PARTS, part=part, **changes)


class Kill(BaseException):
    """Nothing of ours catches it, and nothing is put in order."""


def kill_in_the_middle(options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    written, plain = [], RunFolder.append

    def append(self: RunFolder, *args: object) -> None:
        if len(written) == 2:
            raise Kill
        written.append(args)
        plain(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", append)
        with pytest.raises(Kill):
            preprocess(options)


def test_parts_killed_continued_and_merged_are_one_run(
    options: PreprocessOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = preprocess(options)
    folder = tmp_path / "all.parts"
    for part in (2, 0):  # in any order
        kill_in_the_middle(part_of(options, part), monkeypatch)
    for part in range(NUM_PARTS):
        with pytest.raises(ValueError, match=r"unfinished|must hold|lacks|written"):
            merge_datasets([str(folder)], str(tmp_path / "all_text_document"))
        capsys.readouterr()
        summary = preprocess(part_of(options, part))
        assert (summary.resumed_bytes > 0) == (part in (0, 2))
        assert ("continuing after" in capsys.readouterr().err) == (part in (0, 2))
    merge_datasets([str(folder)], str(tmp_path / "all_text_document"))
    for suffix in (".bin", ".idx"):
        one, all_parts = (tmp_path / f"{n}_text_document{suffix}" for n in ("one", "all"))
        assert one.read_bytes() == all_parts.read_bytes()
    rejects = [path.read_text() for path in sorted(folder.glob("*.rejects.jsonl"))]
    assert "".join(rejects) == (tmp_path / "one.rejects.jsonl").read_text()
    assert whole.rejected_documents == 3

    # an array that is submitted again leaves alone what is done, once it has looked at it
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert preprocess(part_of(options, 1)).tokens > 0
    assert "part 1 was complete already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(ValueError, match=r"append_eod \(False\) was True"):
        preprocess(part_of(options, 1, append_eod=False))
    tokens = folder / f"part-1-of-{NUM_PARTS}_text_document.bin"
    content = bytearray(tokens.read_bytes())
    content[100] ^= 1
    tokens.write_bytes(content)
    with pytest.raises(ValueError, match=r"part-1-of-4_text_document\.bin is not the file that"):
        preprocess(part_of(options, 1))
    preprocess(part_of(options, 1, overwrite=True))
    assert tokens.read_bytes() != content


def test_a_bad_document_of_a_part_is_named_by_its_line(
    options: PreprocessOptions, tmp_path: Path
) -> None:
    strict = replace(options, on_error="stop", chunk_bytes=1_000)
    places = []
    for part in range(NUM_PARTS):
        try:
            preprocess(part_of(strict, part))
        except ValueError as error:
            places.append(str(error).partition(":")[0])
    a = tmp_path / "input" / "a.jsonl"
    assert places == [f"{a}, line 11", f"{a}, line 62"]


def test_a_part_without_a_document_is_no_error(options: PreprocessOptions, tmp_path: Path) -> None:
    source = tmp_path / "long.jsonl"
    source.write_text("".join(json.dumps({"text": "long " * 5_000}) + "\n" for _ in range(2)))
    merged = replace(options, input=[source])
    preprocess(merged)
    assert 0 in [preprocess(part_of(merged, part)).documents for part in range(NUM_PARTS)]
    merge_datasets([str(tmp_path / "all.parts")], str(tmp_path / "all_text_document"))
    for suffix in (".bin", ".idx"):
        one, all_parts = (tmp_path / f"{n}_text_document{suffix}" for n in ("one", "all"))
        assert one.read_bytes() == all_parts.read_bytes()


def test_parts_that_do_not_belong_together_are_not_merged(
    options: PreprocessOptions, tmp_path: Path
) -> None:
    output, folder = str(tmp_path / "all_text_document"), str(tmp_path / "all.parts")
    for part in range(NUM_PARTS):
        preprocess(part_of(options, part))
    prefixes = [f"{folder}/part-{part}-of-{NUM_PARTS}_text_document" for part in range(NUM_PARTS)]
    with pytest.raises(ValueError, match=r"must hold all 4 parts, but lacks 1, 3\."):
        merge_datasets([prefixes[0], prefixes[2]], output)
    with pytest.raises(ValueError, match=r"in order, but has 1, 0, 2, 3\."):
        merge_datasets([prefixes[1], prefixes[0], *prefixes[2:]], output)
    preprocess(options)
    with pytest.raises(
        ValueError, match=r"one_text_document.* must be a part of the same data set"
    ):
        merge_datasets([*prefixes, str(tmp_path / "one_text_document")], output)
    with pytest.raises(ValueError, match=r"num_parts \(2\) must be 4, as of .*part-0-of-4"):
        preprocess(replace(part_of(options, 1), num_parts=2))
    preprocess(part_of(options, 2, keep_empty=True, overwrite=True))
    with pytest.raises(ValueError, match=r"part-2.* same run as .*part-0.* another keep_empty"):
        merge_datasets([folder], output)
    assert not (tmp_path / "all_text_document.bin").exists()


def test_what_cannot_be_cut_is_refused(
    options: PreprocessOptions, tmp_path: Path, fails: Callable[..., str]
) -> None:
    command = ["--input", *options.input, "--tokenizer-type", "NullTokenizer", "--vocab-size", 9]
    command += ["--output-prefix", tmp_path / "all"]

    def refusal(*flags: object) -> str:
        return fails("preprocess_data", *command, *flags)

    assert "part (4) must be from 0 to 3, below num_parts (4)." in refusal(
        "--num-parts", 4, "--part", 4
    )
    with pytest.raises(ValueError, match=r"part \(None\) must come with num_parts \(4\)"):
        replace(options, num_parts=4)
    with pytest.raises(ValueError, match=r"json_keys \(text title\) must be one with num_parts"):
        part_of(options, 0, json_keys=("text", "title"))
    with pytest.raises(ValueError, match=r"input \(-\) must be files with num_parts \(4\)"):
        part_of(options, 0, input=["-"])
    with pytest.raises(ValueError, match=r"num_parts \(999\) must be at most \d+: .* Use --num-p"):
        preprocess(replace(part_of(options, 0), num_parts=999))
    assert not list(tmp_path.glob("all*"))
