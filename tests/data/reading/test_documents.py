import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_satformer.data.reading.documents import build_line_parser, parse_line

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
    b'{"text": "a", "other": "\xff"}\n': r"invalid UTF-8 \(byte 25",
    b'{"text": "\\ud800"}\n': r"half a surrogate pair \(character 1\)",
    b"[" * 100_000: "nested too deep",
    b'\xef\xbb\xbf{"text": "a"}\n': "invalid JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20].decode("latin-1"))
def test_a_bad_line_says_what_is_wrong(line: bytes) -> None:
    for parse in (build_line_parser(["text"]), lambda raw: parse_line(raw, ["text"])):
        with pytest.raises(ValueError, match=BAD_LINES[line]):
            parse(line)


def test_keys_of_any_spelling_come_in_order() -> None:
    line = '{"b c": "1", "é": "2", "class": "3", "n": NaN}'.encode()
    assert build_line_parser(["é", "class", "b c"])(line) == ["2", "3", "1"]


@given(
    st.dictionaries(
        st.sampled_from(["text", "other", "é"]),
        st.one_of(st.text(), st.integers(), st.floats(), st.none(), st.lists(st.text())),
    ),
    st.booleans(),
    st.text(max_size=3),
)
def test_the_fast_parser_agrees_with_json(record: dict, ascii_only: bool, tail: str) -> None:
    line = (json.dumps(record, ensure_ascii=ascii_only) + tail).encode("utf-8", "surrogatepass")
    results = []
    for parse in (build_line_parser(["text"]), lambda raw: parse_line(raw, ["text"])):
        try:
            results.append(parse(line))
        except ValueError as error:
            results.append(str(error))
    assert results[0] == results[1]
