"""A random sample of a stream of documents, of bounded size."""

import heapq
import random
from collections.abc import Iterator


def sample_documents(
    documents: Iterator[list[str]], max_bytes: int, seed: int = 0
) -> list[list[str]]:
    """Returns a sample that every document has the same chance to be in, in the stream's order.

    Each document draws a number, and the smallest numbers win as long as they fit in together. The
    whole stream is read; at no time is more than `max_bytes` and one document held. The same stream
    gives the same sample.

    Args:
        documents: The stream; a document is a list of texts.
        max_bytes: Most bytes of UTF-8 in the sample. A document larger than that is never in it.
        seed: Of the numbers.
    """
    generator = random.Random(seed)
    # The largest number is on top: the first to go.
    heap: list[tuple[float, int, int, list[str]]] = []
    held, limit = 0, 1.0
    for place, texts in enumerate(documents):
        number = generator.random()
        size = sum(len(text.encode("utf-8")) for text in texts)
        if number >= limit or size > max_bytes:
            continue
        heapq.heappush(heap, (-number, place, size, texts))
        held += size
        while held > max_bytes:
            largest, _, freed, _ = heapq.heappop(heap)
            held -= freed
            # Whatever draws more from here on would have gone too.
            limit = -largest
    return [texts for _, _, _, texts in sorted(heap, key=lambda entry: entry[1])]
