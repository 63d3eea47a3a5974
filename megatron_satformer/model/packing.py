"""Which positions of the sequence a rank holds, and which keys each of them reads.

Causal attention where documents packed into one sample do not see each other, within a window, on
a rank that holds two chunks of the sequence (context parallelism): every query reads one run of
keys, that ends at itself. Must not know: kernels, modules.

Shapes: s sequence, b micro-batch, q queries of this rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class Chunk(NamedTuple):
    """A run of the sequence that lies on this rank at `at`."""

    at: int
    start: int
    length: int


class Span(NamedTuple):
    """Queries start..stop of the sequence, which read keys from `first` on."""

    batch: slice
    at: int  # of the first query, on this rank
    first: int
    start: int
    stop: int
    windowed: bool  # else each reads all keys from `first` to itself


@dataclass
class PackedDocuments(PackedSeqParams):
    """Documents of every sample of a micro-batch; samples stay apart, [s, b, ...].

    Args:
        bounds: [b, n], first position of every document, and s behind the last, repeated.
    """

    bounds: Tensor = field(kw_only=True)
    masks: dict[Any, Any] = field(default_factory=dict, kw_only=True)  # made once for all layers

    @cached_property
    def ends(self) -> list[list[int]]:
        """`bounds` on the host."""
        return self.bounds.tolist()

    def starts_at(self, positions: Tensor) -> Tensor:
        """First position of the document of each position; [q] -> [b, q], on the device."""
        positions = positions.to(self.bounds.dtype).expand(len(self.bounds), -1).contiguous()
        number = torch.searchsorted(self.bounds.contiguous(), positions, right=True) - 1
        return self.bounds.gather(1, number)


def is_one_stream(args: Any) -> bool:
    """Whether the samples of a micro-batch, with their documents, are one: Transformer Engine's."""
    return args.dataloader_inter_document_masking and args.transformer_impl != "local"


def pack_documents(batch: dict[str, Any], args: Any) -> PackedSeqParams:
    """What the backend's attention needs.

    Args:
        batch: "cu_seqlens" is [b, n], as Megatron's dataset makes it; where it `is_one_stream`,
            [1, n], by Megatron's flatten_batch_for_packed_sequences.
        args: Megatron's.
    """
    if not is_one_stream(args):
        return pack_samples(batch["cu_seqlens"], args.seq_length)
    bounds, longest = batch["cu_seqlens"].squeeze(0), int(batch["max_seqlen"].item())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=args.seq_length,
    )


def pack_samples(bounds: Tensor, sequence: int) -> PackedDocuments:
    """Documents within samples of that length; see PackedDocuments."""
    offsets = sequence * torch.arange(len(bounds), dtype=bounds.dtype, device=bounds.device)
    stream = (bounds + offsets.unsqueeze(1)).flatten()  # documents of no length in between
    # As rotary embeddings tell distances alone, their positions run on through the documents.
    return PackedDocuments(
        qkv_format="sbhd",
        cu_seqlens_q=stream,
        cu_seqlens_kv=stream,
        max_seqlen_q=sequence,
        max_seqlen_kv=sequence,
        bounds=bounds,
    )


def chunks_of(queries: int, ranks: int, rank: int) -> tuple[Chunk, ...]:
    """Where a rank's queries lie: Megatron's zigzag, chunks r and 2 ranks - 1 - r of 2 ranks."""
    if ranks == 1:
        return (Chunk(0, 0, queries),)
    half = queries // 2
    return Chunk(0, rank * half, half), Chunk(half, (2 * ranks - 1 - rank) * half, half)


def spans_of(
    chunks: tuple[Chunk, ...],
    sequence: int,
    documents: PackedDocuments | None,
    window: int | None,
    block: int,
) -> Iterator[Span]:
    """Cuts a rank's queries into runs of one document, in blocks where a window counts.

    Args:
        chunks: of this rank.
        sequence: s.
        documents: None: one a sample.
        window: keys that a query reads before its own; None: all.
        block: most queries of a span with a window.
    """
    samples = [(slice(None), [0, sequence])]
    if documents is not None:
        samples = [(slice(n, n + 1), ends) for n, ends in enumerate(documents.ends)]
    for batch, ends in samples:
        for chunk in chunks:
            for first, last in pairwise(ends):
                start, stop = max(first, chunk.start), min(last, chunk.start + chunk.length)
                offset = chunk.at - chunk.start
                if start >= stop:
                    continue
                if window is None or last - first <= window + 1:
                    yield Span(batch, start + offset, first, start, stop, False)
                    continue
                for begin in range(start, stop, block):
                    reach = max(first, begin - window)
                    end = min(begin + block, stop)
                    yield Span(batch, begin + offset, reach, begin, end, True)


def reach_of(
    chunks: tuple[Chunk, ...], documents: PackedDocuments | None, window: int | None, device: Any
) -> tuple[Tensor, Tensor]:
    """First and last key that each query of a rank reads: [b, q] or [1, q], and [q].

    Made on the device, without asking for a value.
    """
    runs = [torch.arange(c.start, c.start + c.length, device=device) for c in chunks]
    last = torch.cat(runs)
    first = torch.zeros_like(last).unsqueeze(0) if documents is None else documents.starts_at(last)
    if window is not None:
        first = torch.maximum(first, last - window)
    return first.to(torch.int32), last.to(torch.int32)
