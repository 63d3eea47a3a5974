import json
from collections.abc import Callable
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_satformer.data.datasets import verify
from megatron_satformer.data.datasets.checksum import file_sha256
from megatron_satformer.data.datasets.indexed import (
    IndexedFile,
    bin_path,
    idx_path,
)
from megatron_satformer.data.datasets.manifest import (
    Checksum,
    describe_dataset,
    find_manifest,
    forget_dataset,
    manifest_path,
    read_manifest,
    record_dataset,
)
from megatron_satformer.data.datasets.report import open_dataset, report_dataset
from megatron_satformer.data.datasets.verify import verify_dataset
from megatron_satformer.data.tokenizers.exact import build_tokenizer
from tests.datasets import write_dataset

DOCUMENTS = [[5, 6, 7], [], [1], list(range(40)), [99, 0]]


def make(prefix: Path, documents: list[list[int]] = DOCUMENTS) -> Path:
    tokens = [token for document in documents for token in document]
    lengths = [len(document) for document in documents]
    write_dataset(prefix, tokens, lengths, 70_000 if max(tokens) >= 65_500 else 100)
    return prefix


def record(prefix: Path, path: Path | None = None, cut: int = 0) -> Path:
    data = IndexedFile(prefix)
    size = bin_path(prefix).stat().st_size
    cuts = sorted({0, min(cut, size), size})
    content = bin_path(prefix).read_bytes()
    pieces = [content[begin:end] for begin, end in pairwise(cuts)]
    parts = [Checksum(len(piece), sha256(piece).hexdigest()) for piece in pieces]
    index = Checksum(idx_path(prefix).stat().st_size, file_sha256(idx_path(prefix)))
    entry = describe_dataset(data.documents, data.tokens.size, data.dtype.name, parts, index)
    path = path or manifest_path(prefix)
    record_dataset(path, prefix.name, entry)
    return path


def test_the_manifest_of_a_data_set_is_found(tmp_path: Path) -> None:
    prefix = make(tmp_path / "my_corpus_text_document")
    make(tmp_path / "my_corpus_title_document")
    assert find_manifest(prefix) is None
    path = record(prefix, manifest_path(tmp_path / "my_corpus"))
    record(tmp_path / "my_corpus_title_document", path)
    assert find_manifest(prefix) == path
    # One with a fitting name that does not describe it is passed over; forgetting spares others.
    record(make(tmp_path / "my"))
    forget_dataset(prefix)
    assert find_manifest(prefix) is None
    assert list(read_manifest(path)["datasets"]) == ["my_corpus_title_document"]
    forget_dataset(tmp_path / "my_corpus_title_document")
    assert not path.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "{", r"my\.manifest\.json is damaged: Expecting"),
        (lambda c: b"\xff", "is damaged: .*codec"),
        (lambda c: [], "it is not a"),
        (lambda c: c | {"format": "x"}, "it is not a"),
        (lambda c: c | {"version": 2}, "its version is 2, not 1"),
        (lambda c: c | {"datasets": 3}, '"datasets" is missing'),
        (lambda c: c["datasets"].update(my=3), "my is 3"),
        (lambda c: c["datasets"]["my"].update(tokens=-1), "my: tokens is -1"),
        (lambda c: c["datasets"]["my"].update(documents=True), "my: documents is True"),
        (lambda c: c["datasets"]["my"].update(dtype=None), "my: dtype is None"),
        (lambda c: c["datasets"]["my"].update(bin=[]), "my: bin has no size"),
        (lambda c: c["datasets"]["my"]["idx"].update(sha256="ab"), "my: idx has no sha256"),
        (lambda c: c["datasets"]["my"]["bin"].update(parts=[{"bytes": 9}]), "bin has no sha256"),
        (lambda c: c["datasets"]["my"]["bin"].update(parts=3), "my: bin has no sha256"),
        (lambda c: c["datasets"]["my"]["bin"].update(parts=[]), "parts of bin are not its 92 byt"),
    ],
)
def test_a_damaged_manifest(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    path = record(make(tmp_path / "my"))
    content = read_manifest(path)
    changed = change(content)
    changed = content if changed is None else changed
    if isinstance(changed, str | bytes):
        path.write_bytes(changed.encode() if isinstance(changed, str) else changed)
    else:
        path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=message) as error:
        verify_dataset(IndexedFile(tmp_path / "my"))
    assert "remove it" in str(error.value)


@pytest.mark.parametrize("cut", [0, 46])
def test_every_flipped_bit_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    monkeypatch.setattr(verify, "STEP", 22)
    prefix = make(tmp_path / "my")
    record(prefix, cut=cut)
    found = verify_dataset(IndexedFile(prefix), 100)
    assert (found.smallest_token, found.largest_token) == (0, 99)
    assert [part.bytes for part in found.bin_checksums] == ([46, 46] if cut else [92])
    if not cut:
        assert found.bin_checksums[0].sha256 == file_sha256(bin_path(prefix))
    for path in (bin_path(prefix), idx_path(prefix)):
        good = path.read_bytes()
        for bit in range(8 * len(good)):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bad)
            with pytest.raises(ValueError, match=r"my\.(bin|idx) "):
                verify_dataset(IndexedFile(prefix), 100)
        for bad in (good[:-2], good + b"\0\0", b""):
            path.write_bytes(bad)
            with pytest.raises(ValueError, match=r"my\.(bin|idx) "):
                verify_dataset(IndexedFile(prefix))
        path.write_bytes(good)
    # A data set that is whole, but another than the one described.
    prefix.with_name("my.idx").unlink()
    bin_path(prefix).unlink()
    make(prefix, [*DOCUMENTS, []])
    with pytest.raises(ValueError, match=r"my\.idx is not the file that .*my\.manifest\.json desc"):
        verify_dataset(IndexedFile(prefix))


def test_a_token_outside_the_vocabulary_is_placed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "STEP", 8)
    prefix = make(tmp_path / "my")
    message = (
        r"my\.bin must hold tokens in \[0, 99\); at byte 88, in document 4 \(sequence 3\), .*99"
    )
    with pytest.raises(ValueError, match=message):
        verify_dataset(IndexedFile(prefix), 99)
    prefix = make(tmp_path / "wide", [[1, 70_000 - 1], [2]])
    tokens = np.fromfile(bin_path(prefix), "<i4")
    tokens[2] = -7
    tokens.tofile(bin_path(prefix))
    with pytest.raises(ValueError, match=r"at byte 8, in document 1 \(sequence 1\), it has -7"):
        verify_dataset(IndexedFile(prefix))


def test_lengths_are_those_of_whole_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    monkeypatch.setattr("megatron_satformer.data.datasets.indexed.BLOCK", 13)
    monkeypatch.setattr("megatron_satformer.data.datasets.report.DIGIT", 3)
    for seed, count in enumerate((1, 2, 99, 100)):
        rng = np.random.default_rng(seed)
        parts = [rng.integers(1, 90, size=rng.integers(0, 4)).tolist() for _ in range(count)]
        builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), np.uint16)
        for lengths in parts:
            builder.add_document(np.arange(sum(lengths)), lengths)
        builder.finalize(str(tmp_path / "a.idx"))
        lengths = np.array([sum(part) for part in parts])
        data = open_dataset(tmp_path / "a")
        report = report_dataset(data)
        assert (report.documents, report.sequences) == (count, sum(map(len, parts)))
        assert report.empty_documents == (lengths == 0).sum()
        assert (report.shortest, report.longest) == (lengths.min(), lengths.max())
        assert report.median == np.median(lengths)
        assert report.mean == pytest.approx(lengths.mean())
        assert [data.document(number).tolist() for number in range(count)] == [
            list(range(length)) for length in lengths
        ]
        for bins in (1, 3, 64):
            rows = report_dataset(data, bins).histogram
            assert len(rows) <= bins
            for row in rows:
                inside = lengths[(lengths >= row.low) & (lengths <= row.high)]
                assert (row.documents, row.tokens) == (inside.size, inside.sum())
            assert sum(row.documents for row in rows) == count


def test_the_tool_shows_text(
    tmp_path: Path, spm_model: str, texts: list[str], tool: Callable, fails: Callable[..., str]
) -> None:
    from megatron_satformer.data.tokenizers.options import TokenizerOptions

    tokenizer = build_tokenizer(TokenizerOptions("SentencePieceTokenizer", spm_model))
    prefix = tmp_path / "corpus_text_document"
    documents = tokenizer.encode_batch(texts)
    lengths = [len(ids) for ids in documents]
    write_dataset(prefix, [id_ for ids in documents for id_ in ids], lengths, tokenizer.vocab_size)
    record(prefix, manifest_path(tmp_path / "corpus"))
    flags = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", spm_model)
    result = tool("inspect_dataset", prefix, *flags, "--document", 3, 9, "--verify", "--json")
    assert result.returncode == 0, result
    content = json.loads(result.stdout)
    assert [one["text"] for one in content["shown"]] == [texts[3], texts[9]]
    assert content["documents"] == len(texts)
    assert content["verified"]["manifest"] == str(tmp_path / "corpus.manifest.json")
    result = tool("inspect_dataset", prefix, "--document", 3, "--verify")
    assert f"\n{' '.join(map(str, tokenizer.encode(texts[3])))}\n" in result.stdout
    assert "no --vocab-size to compare with" in result.stdout
    last = len(texts) - 1
    for wrong, message in (
        (("--document", last, last + 1), rf"document ({last + 1}) must be in [0, {last + 1})"),
        (("--tokenizer-model", spm_model), "tokenizer_model must come with tokenizer_type"),
        (("--vocab-size", 100), "vocab_size (100) must come with verify"),
        (("--vocab-size", 100, "--verify"), "must hold tokens in [0, 100); at byte"),
    ):
        assert message in fails("inspect_dataset", prefix, *wrong)
    assert "Use " in fails("inspect_dataset", bin_path(prefix))
