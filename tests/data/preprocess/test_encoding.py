import pickle
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from megatron_satformer.data.preprocess import encoding
from megatron_satformer.data.preprocess.encoding import (
    BadDocumentError,
    ChunkEncoder,
    Encoded,
    MismatchError,
)
from megatron_satformer.data.preprocess.options import PreprocessOptions
from megatron_satformer.data.reading.chunks import Chunk
from megatron_satformer.data.reading.inputs import Source
from megatron_satformer.data.tokenizers.options import TokenizerOptions

# Its eod is 299.
NUMBERS = TokenizerOptions("NullTokenizer", vocab_size=300)
ROWS = Source("a.parquet", "parquet", None, 0, 0)


def rows(*documents: str | tuple[str | None, ...], number: int = 0) -> Chunk:
    texts = [(text,) if isinstance(text, str) else text for text in documents]
    content = [tuple(None if text is None else text.encode() for text in row) for row in texts]
    return Chunk(number, 0, ROWS, 0, content)


def build(tokenizer: TokenizerOptions = NUMBERS, **options: object) -> ChunkEncoder:
    return ChunkEncoder(PreprocessOptions(["a.parquet"], "x", tokenizer, **options))  # type: ignore[arg-type]


def encode(chunk: Chunk, **options: object) -> Encoded:
    return build(**options).encode(chunk)


class Backwards:
    """A fast engine that is right for some texts, wrong for others and avoids a third kind."""

    def takes(self, text: str) -> bool:
        return "7" not in text

    def encode_batch(
        self, texts: Sequence[str]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        ids = [[int(n) for n in text.split(" ")] for text in texts]
        ids = [numbers[::-1] if 13 in numbers else numbers for numbers in ids]
        lengths = np.array([len(numbers) for numbers in ids], dtype=np.int64)
        return np.concatenate(ids).astype(np.uint32), lengths


def fast_encoder(fraction: float) -> ChunkEncoder:
    encoder = build(append_eod=True, verify_fraction=fraction)
    encoder.pipeline, encoder.fast = "", Backwards()  # type: ignore[assignment]
    return encoder


def test_documents_end_with_eod_unless_they_are_empty(spm: TokenizerOptions) -> None:
    chunk = rows("a", "", "b c", "")
    for keep in (False, True):
        (part,) = build(spm, append_eod=True, keep_empty=keep).encode(chunk).keys
        ends = np.cumsum(part.lengths[part.lengths > 0]) - 1
        assert (part.ids[ends] == 2).all()
        assert (part.ids == 2).sum() == 2
        assert part.empty == 2
        assert list(part.lengths > 0) == ([True, False, True, False] if keep else [True, True])
        assert part.ids.dtype == np.uint16


def test_an_encoder_travels_without_its_tokenizers(spm: TokenizerOptions) -> None:
    chunk = rows("a", "", "b c")
    here = build(spm, append_eod=True)
    (part,) = here.encode(chunk).keys
    there = pickle.loads(pickle.dumps(here))
    assert not {"exact", "fast", "read"} & vars(there).keys()
    (same,) = there.encode(chunk).keys
    assert same.ids.tolist() == part.ids.tolist()
    assert same.lengths.tolist() == part.lengths.tolist()


def test_routed_documents_stand_where_they_belong() -> None:
    encoded = fast_encoder(1.0).encode(rows("1 2", "7 8 9", "3", "7", "4 5 6"))
    (part,) = encoded.keys
    assert part.ids.tolist() == [1, 2, 299, 7, 8, 9, 299, 3, 299, 7, 299, 4, 5, 6, 299]
    assert part.lengths.tolist() == [3, 4, 2, 2, 4]
    assert (encoded.routed, encoded.verified, part.largest) == (2, 3, 299)


def test_a_wrong_id_is_found_in_the_sample() -> None:
    chunk = rows("1 2", "12 13", "3")
    with pytest.raises(MismatchError) as error:
        fast_encoder(1.0).encode(chunk)
    assert (error.value.offset, error.value.excerpt) == (1, "12 13")
    # Nobody looks at a fraction of 0: the ids are the engine's.
    (part,) = fast_encoder(0.0).encode(chunk).keys
    assert part.ids.tolist() == [1, 2, 299, 13, 12, 299, 3, 299]


def test_the_sample_is_the_same_for_the_same_chunk_and_of_the_size_asked() -> None:
    chunks = [rows(*["1"] * 2000, number=number) for number in (5, 5, 6)]
    counts = [fast_encoder(0.25).encode(chunk).verified for chunk in chunks]
    assert counts[0] == counts[1] != counts[2]
    assert all(400 < count < 600 for count in counts)


def test_bad_documents_are_left_out_of_every_key() -> None:
    chunk = rows(("1", "2"), ("3", None), ("4", "x"), ("5", "300"), ("6", f"{2**70}"), ("7", "8"))
    encoded = encode(chunk, json_keys=("text", "other"), on_error="skip", append_eod=True)
    assert [bad.offset for bad in encoded.rejected] == [1, 2, 3, 4]
    assert (
        encoded.rejected[2].reason == "token id 300 must be in [0, 300), the tokenizer's vocabulary"
    )
    assert "beyond any vocabulary" in encoded.rejected[3].reason
    assert [part.ids.tolist() for part in encoded.keys] == [[1, 299, 7, 299], [2, 299, 8, 299]]
    with pytest.raises(BadDocumentError) as error:
        encode(chunk, json_keys=("text", "other"))
    assert error.value.offset == 1


def test_a_document_that_the_index_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "MOST_TOKENS", 4)
    assert encode(rows("1 2 3", "1 2 3 4")).keys[0].lengths.tolist() == [3, 4]
    with pytest.raises(BadDocumentError, match="has 4 tokens, more than a document") as error:
        encode(rows("1 2 3", "1 2 3 4"), append_eod=True)
    assert error.value.offset == 1
