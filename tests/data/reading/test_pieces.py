from itertools import pairwise
from pathlib import Path

import pytest

from megatron_satformer.data.reading.chunks import read_chunks
from megatron_satformer.data.reading.inputs import Source
from megatron_satformer.data.reading.pieces import cut_part, whole_pieces

CHUNK = 10


def make_sources(*sizes: tuple[int, bool]) -> list[Source]:
    return [
        Source(f"{index}", "jsonl", None if plain else "gzip", size, 0)
        for index, (size, plain) in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    "sizes",
    [
        [(1000, True)],
        [(7, True), (95, True), (1, True)],
        [(300, False), (40, True), (2, False), (500, False), (33, True)],
        [(1, False)] * 9 + [(900, True)],
        [(900, False)] + [(1, True)] * 9,
    ],
    ids=str,
)
def test_parts_are_the_whole_once_and_none_is_empty(sizes: list[tuple[int, bool]]) -> None:
    sources = make_sources(*sizes)
    most = sum(-(-size // CHUNK) if plain else 1 for size, plain in sizes)
    for num_parts in range(1, most + 1):
        parts = [cut_part(sources, CHUNK, num_parts, part) for part in range(num_parts)]
        assert all(parts)
        joined = [[piece.index, piece.begin, piece.end] for part in parts for piece in part]
        for before, after in pairwise(joined):
            if before[0] == after[0]:
                assert before[2] == after[1]
                assert before[2] % CHUNK == 0
        spans = {index: [0, 0] for index in range(len(sources))}
        for index, begin, end in joined:
            assert spans[index][1] == begin < end
            spans[index][1] = end
        assert [spans[p.index] for p in whole_pieces(sources)] == [[0, size] for size, _ in sizes]
    with pytest.raises(ValueError, match=rf"num_parts \({most + 1}\) must be at most {most}: .*"):
        cut_part(sources, CHUNK, most + 1, 0)


def test_parts_are_balanced_where_files_can_be_cut() -> None:
    sources = make_sources((1000, True), (2000, True), (10, True))
    sizes = [sum(p.end - p.begin for p in cut_part(sources, CHUNK, 7, n)) for n in range(7)]
    assert max(sizes) - min(sizes) <= 2 * CHUNK


def test_a_line_belongs_to_the_piece_it_starts_in(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [b"x" * (n % 23) + b"\n" for n in range(50)]
    path.write_bytes(b"".join(lines))
    source = Source(str(path), "jsonl", None, path.stat().st_size, 0)
    starts = [sum(map(len, lines[:n])) for n in range(50)]
    num_parts = 9
    for part in range(num_parts):
        (piece,) = cut_part([source], CHUNK, num_parts, part)
        assert piece.lines_before == sum(start < piece.begin for start in starts)
        chunks = list(read_chunks([source], ["text"], None, CHUNK, [piece]))
        assert [chunk.content for chunk in chunks] == [
            range(begin, min(begin + CHUNK, piece.end))
            for begin in range(piece.begin, piece.end, CHUNK)
        ]
