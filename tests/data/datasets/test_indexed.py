import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_satformer.data.datasets.indexed import (
    IndexedFile,
    bin_path,
    check_output_free,
    idx_path,
    token_dtype,
)
from tests.datasets import write_dataset

DOCUMENTS = [[5, 6, 7], [], [1], list(range(40)), [], [99, 0]]


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 100) -> Path:
    tokens = [token for document in documents for token in document]
    write_dataset(prefix, tokens, [len(document) for document in documents], vocab_size)
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


def test_existing_output_is_kept_unless_told(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)
    with pytest.raises(ValueError, match=r"a\.idx exists already. Pass --overwrite"):
        check_output_free(prefix, overwrite=False)
    check_output_free(prefix, overwrite=True)
    idx_path(prefix).unlink()
    with pytest.raises(ValueError, match=r"a\.bin exists already"):
        check_output_free(prefix, overwrite=False)
    # What a kill between the two renames leaves can be repeated.
    Path(f"{idx_path(prefix)}.partial").touch()
    check_output_free(prefix, overwrite=False)


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
