import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_satformer.data.datasets.indexed import (
    IndexedFile,
    IndexedWriter,
    bin_path,
    idx_path,
    publish,
    token_dtype,
)

DOCUMENTS = [[5, 6, 7], [], [1], list(range(40)), [], [99, 0]]


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 100, **options: bool) -> Path:
    with IndexedWriter(prefix, vocab_size, **options) as writer:
        # In two batches: what a document is must not depend on them.
        for batch in (documents[:2], documents[2:]):
            tokens = [token for document in batch for token in document]
            writer.add_documents(tokens, [len(document) for document in batch])
        publish([writer])
    return prefix


def write_with_megatron(prefix: Path, documents: list[list[int]], vocab_size: int) -> Path:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(bin_path(prefix)), DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(document, [len(document)] if document else [])
    builder.finalize(str(idx_path(prefix)))
    return prefix


@pytest.mark.parametrize("vocab_size", [100, 65499, 65500, 200_000])
def test_bytes_equal_megatrons_and_each_reads_the_other(tmp_path: Path, vocab_size: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    rng = np.random.default_rng(vocab_size)
    lengths = rng.integers(0, 50, size=300)
    documents = [rng.integers(0, vocab_size, size=length).tolist() for length in lengths]
    documents[3] = [vocab_size - 1]
    ours = write(tmp_path / "ours", documents, vocab_size)
    theirs = write_with_megatron(tmp_path / "theirs", documents, vocab_size)
    assert bin_path(ours).read_bytes() == bin_path(theirs).read_bytes()
    assert idx_path(ours).read_bytes() == idx_path(theirs).read_bytes()

    present = [document for document in documents if document]
    read_by_megatron = IndexedDataset(str(ours))
    assert [read_by_megatron[i].tolist() for i in range(len(read_by_megatron))] == present
    read_by_us = IndexedFile(theirs)
    assert [read_by_us[i].tolist() for i in range(len(read_by_us))] == present
    assert read_by_us.documents == len(documents)
    assert read_by_us.dtype == token_dtype(vocab_size)


@pytest.mark.parametrize("bad", [-1, 100, 65536 + 5, 2**40])
def test_an_id_outside_the_vocabulary_is_refused_not_wrapped(tmp_path: Path, bad: int) -> None:
    with (
        IndexedWriter(tmp_path / "a", 100) as writer,
        pytest.raises(ValueError, match=rf"token id {bad} must be in \[0, 100\)"),
    ):
        writer.add_documents([1, bad, 2], [3])
    assert list(tmp_path.iterdir()) == []


def test_lengths_must_fit_the_tokens(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", 100) as writer:
        for lengths in ([2], [4, -1]):
            with pytest.raises(ValueError, match="lengths must add up to the 3 tokens"):
                writer.add_documents([1, 2, 3], lengths)


def test_nothing_has_the_final_names_before_publish(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", 100) as writer:
        writer.add_documents([1, 2], [2])
        writer.seal()
        assert {path.suffix for path in tmp_path.iterdir()} == {".partial"}
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept_unless_told(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)
    before = bin_path(prefix).read_bytes()
    with pytest.raises(ValueError, match=r"a\.idx exists already. Pass --overwrite"):
        write(prefix, [[1], [2], [3]])
    assert bin_path(prefix).read_bytes() == before
    write(prefix, [[1], [2], [3]], overwrite=True)
    assert IndexedFile(prefix).tokens.tolist() == [1, 2, 3]
    idx_path(prefix).unlink()
    with pytest.raises(ValueError, match=r"a\.bin exists already"):
        write(prefix, DOCUMENTS)


def test_a_kill_between_the_two_renames_can_be_repeated(tmp_path: Path) -> None:
    prefix = tmp_path / "a"
    writer = IndexedWriter(prefix, 100)
    writer.add_documents([1, 2], [2])
    writer.seal()
    writer._bin.publish()
    writer._idx.file.close()  # what the kernel does to a killed process
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx.partial"]
    write(prefix, DOCUMENTS)
    assert IndexedFile(prefix).documents == len(DOCUMENTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_two_writers_of_one_output_cannot_mix(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", 100) as writer:
        writer.add_documents([1, 2], [2])
        with pytest.raises(ValueError, match="being written by another process"):
            IndexedWriter(tmp_path / "a", 100)
        publish([writer])
    assert IndexedFile(tmp_path / "a").tokens.tolist() == [1, 2]


def damage(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


# Where each part of the index of DOCUMENTS lies: 4 sequences, 7 boundaries.
LENGTHS, POINTERS, BOUNDARIES = 34, 34 + 4 * 4, 34 + 4 * 4 + 8 * 4
DAMAGES = {
    "magic": (lambda p: damage(idx_path(p), 0, b"NOT"), r"a\.idx is not a Megatron index"),
    "version": (lambda p: damage(idx_path(p), 9, b"\2"), "not a Megatron index of version 1"),
    "dtype": (lambda p: damage(idx_path(p), 17, b"\11"), r"unknown dtype code \(9\)"),
    "count": (lambda p: damage(idx_path(p), 18, struct.pack("<Q", 2**60)), "is damaged: "),
    "empty idx": (lambda p: idx_path(p).write_bytes(b""), r"a\.idx is truncated: 0 bytes"),
    "short idx": (lambda p: idx_path(p).write_bytes(idx_path(p).read_bytes()[:-1]), "need 138"),
    "empty bin": (lambda p: bin_path(p).write_bytes(b""), r"a\.bin is truncated: 0 bytes"),
    "short bin": (lambda p: bin_path(p).write_bytes(bin_path(p).read_bytes()[:-2]), "truncated"),
    "long bin": (lambda p: bin_path(p).write_bytes(b"\0" * 94), "not the file this index was made"),
    "length": (lambda p: damage(idx_path(p), LENGTHS, b"\xff" * 4), "at sequence 0, of -1 tokens"),
    "pointer": (
        lambda p: damage(idx_path(p), POINTERS + 8, b"\7"),
        "sequence 1, .* byte 7 and not 6",
    ),
    "first boundary": (lambda p: damage(idx_path(p), BOUNDARIES, b"\1"), "document boundaries"),
    "last boundary": (lambda p: damage(idx_path(p), BOUNDARIES + 48, b"\5"), r"number 6 \(5\) on"),
    "boundaries": (lambda p: damage(idx_path(p), BOUNDARIES + 16, b"\4"), r"number 3 \(2\) on"),
    "no idx": (lambda p: idx_path(p).unlink(), r"a\.idx is missing \(a\.bin exists\)"),
    "no bin": (lambda p: bin_path(p).unlink(), r"a\.bin is missing \(a\.idx exists\)"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_named(tmp_path: Path, name: str) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)
    change, message = DAMAGES[name]
    change(prefix)
    with pytest.raises(ValueError, match=message) as error:
        IndexedFile(prefix)
    assert "make it again with tools/preprocess_data.py" in str(error.value)


def test_nothing_there_says_both_are_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.idx is missing \(a\.bin is missing too\)"):
        IndexedFile(tmp_path / "a")


def test_a_multimodal_index_is_called_by_its_name(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)
    with idx_path(prefix).open("ab") as file:
        file.write(bytes(4))
    with pytest.raises(ValueError, match=r"a\.idx has a mode for each sequence: .* multimodal"):
        IndexedFile(prefix)


def test_a_document_is_all_its_sequences(tmp_path: Path) -> None:
    data = IndexedFile(write(tmp_path / "a", DOCUMENTS))
    assert [data.document(number).tolist() for number in range(data.documents)] == DOCUMENTS
    for wrong in (-1, data.documents):
        with pytest.raises(ValueError, match=rf"^document \({wrong}\) must be in \[0, 6\)"):
            data.document(wrong)
