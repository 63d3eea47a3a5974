"""What of the inputs one part of a run reads: the same documents in the same order, cut once each.

A plain JSON lines file can be read from any place on; every other file is read from its beginning,
and is never cut. Where the cuts are depends on the sizes of the inputs alone.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from megatron_satformer.data.reading.inputs import STDIN, Source

_BLOCK = 1 << 24


@dataclass(frozen=True)
class Piece:
    """Bytes of one input: all of them, or of a plain JSON lines file those of whole chunks.

    Attributes:
        index: Of the input, from 0.
        source: The input.
        begin: First byte; a line belongs to the piece that it starts in.
        end: Behind the last byte.
    """

    index: int
    source: Source
    begin: int
    end: int

    @property
    def lines_before(self) -> int:
        """Lines of the file that start before this piece: for messages, since it reads the file."""
        return _lines_before(self.source.path, self.begin) if self.begin else 0


def whole_pieces(sources: Sequence[Source]) -> list[Piece]:
    """Returns a piece for each input."""
    return [Piece(index, source, 0, source.size) for index, source in enumerate(sources)]


def can_be_cut(source: Source) -> bool:
    """Whether a file can be read from any place on."""
    return source.format == "jsonl" and source.compression is None and source.path != STDIN


def cut_part(sources: Sequence[Source], chunk_bytes: int, num_parts: int, part: int) -> list[Piece]:
    """Returns what part `part`, from 0, of `num_parts` reads; all parts in order are all inputs.

    Parts have about as many bytes each as whole files allow, and none is empty.

    Args:
        sources: The inputs, in order.
        chunk_bytes: Of a chunk: a plain JSON lines file is cut at multiples of it.
        num_parts: How many parts there are.
        part: Which one.

    Raises:
        ValueError: If there are more parts than the inputs can be cut into.
    """
    counts = [-(-s.size // chunk_bytes) if can_be_cut(s) else 1 for s in sources]
    first = [0, *accumulate(counts)]
    if num_parts > first[-1]:
        raise ValueError(
            f"num_parts ({num_parts}) must be at most {first[-1]}: into more pieces these inputs "
            "cannot be cut (files that are compressed, Parquet, Arrow or plain text are one "
            f"each). Use --num-parts {first[-1]}, or more files."
        )
    starts = [0, *accumulate(source.size for source in sources)]
    cuts = [0]
    for number in range(1, num_parts):
        place = starts[-1] * number // num_parts
        index = min(bisect_right(starts, place), len(sources)) - 1
        step = chunk_bytes if can_be_cut(sources[index]) else max(sources[index].size, 1)
        cut = first[index] + min(round((place - starts[index]) / step), counts[index])
        cuts.append(min(max(cut, cuts[-1] + 1), first[-1] - num_parts + number))
    begin, end = [*cuts, first[-1]][part : part + 2]
    pieces = []
    for index, source in enumerate(sources):
        low, high = max(begin - first[index], 0), min(end - first[index], counts[index])
        if low < high:
            step = chunk_bytes if can_be_cut(source) else source.size
            pieces.append(Piece(index, source, low * step, min(high * step, source.size)))
    return pieces


@lru_cache(maxsize=8)
def _lines_before(path: str, byte: int) -> int:
    lines, left = 1, byte - 1
    with open(path, "rb") as file:
        while left and (block := file.read(min(left, _BLOCK))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines
