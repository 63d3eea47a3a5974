import gzip
import json
from pathlib import Path

import pytest

from megatron_satformer.data.documents import check_inputs, parse_line, read_chunks

BAD_LINES = {
    b'{"text": "a"': "invalid JSON",
    b"\n": "the line is empty",
    b"  \n": "the line is empty",
    b'["a"]\n': "must be a JSON object, not an array",
    b"3\n": "must be a JSON object, not a number",
    b'{"body": "a", "id": 1}\n': r'no key "text" \(its keys: body, id\); see --json-keys',
    b"{}\n": r'no key "text" \(its keys: none\)',
    b'{"text": 3}\n': '"text" must be a string, not a number',
    b'{"text": null}\n': '"text" must be a string, not null',
    b'{"text": true}\n': '"text" must be a string, not true or false',
    b'{"text": ["a", "b"]}\n': '"text" must be a string, not an array',
    b'{"text": {}}\n': '"text" must be a string, not an object',
    b'{"text": "\xff"}\n': r"invalid UTF-8 \(byte 11",
    b'{"text": "\\ud800"}\n': r"half a surrogate pair \(character 1\)",
    b"[" * 100_000: "nested too deep",
    b'\xef\xbb\xbf{"text": "a"}\n': "invalid JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20].decode("latin-1"))
def test_a_bad_line_says_what_is_wrong(line: bytes) -> None:
    with pytest.raises(ValueError, match=BAD_LINES[line]):
        parse_line(line, ["text"])


def test_text_comes_back_as_it_was() -> None:
    text = 'a\n\t"\\ \u2028 \x00 \U0001f600'
    for ascii_only in (True, False):
        line = json.dumps({"text": text, "other": 1}, ensure_ascii=ascii_only).encode()
        assert parse_line(line, ["text"]) == [text]


@pytest.mark.parametrize("chunk_bytes", [1, 100, 1 << 20])
def test_chunks_cover_every_line_once_with_its_number(tmp_path: Path, chunk_bytes: int) -> None:
    lines = [b'{"text": "%d"}\n' % number * (1 + number % 3) for number in range(200)]
    lines[-1] = lines[-1].rstrip()
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.write_bytes(b"".join(lines))
    with gzip.open(packed, "wb") as file:
        file.write(b"".join(lines))
    expected = b"".join(lines).splitlines(keepends=True)
    chunks = list(read_chunks([plain, packed], chunk_bytes))
    for path in (plain, packed):
        mine = [chunk for chunk in chunks if chunk.path == str(path)]
        assert [line for chunk in mine for line in chunk.lines] == expected
        first = 1
        for chunk in mine:
            assert chunk.first_line == first
            first += len(chunk.lines)
        assert sum(chunk.file_bytes for chunk in mine) == path.stat().st_size


def test_a_damaged_gz_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    for content in (whole[:-20], b"no gzip at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz\) is damaged after line"):
            list(read_chunks([path]))


def test_inputs_are_checked(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    cases = {
        tmp_path / "none.jsonl": "does not exist",
        tmp_path: "is a folder",
        tmp_path / "a.parquet": r"must be JSON lines, plain or \.gz; \.parquet is not read yet",
    }
    for path, message in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            check_inputs([path])
        assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="input must name at least one"):
        check_inputs([])
