import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_satformer.data.datasets.checksum import file_sha256
from megatron_satformer.data.datasets.indexed import (
    HEADER,
    MAGIC,
    IndexedFile,
    bin_path,
    idx_path,
)
from megatron_satformer.data.datasets.manifest import (
    Checksum,
    describe_dataset,
    manifest_path,
    record_dataset,
)
from megatron_satformer.data.training.data_paths import read_data_paths
from megatron_satformer.data.training.preflight import (
    check_data_options,
    check_training_data,
)
from tests.datasets import write_dataset


def make(prefix: Path, documents: int = 100, largest: int = 9, vocab_size: int = 100) -> str:
    return write_dataset(prefix, [*range(9), largest] * documents, [10] * documents, vocab_size)


def test_a_good_data_set(tmp_path: Path) -> None:
    path = make(tmp_path / "a", documents=200)
    summary = check_training_data([path], "98,1,1", vocab_size=10)
    (dataset,) = summary.datasets
    assert (summary.documents, summary.tokens) == (200, 2000)
    assert dataset.split_documents == (196, 2, 2)
    assert dataset.split_tokens == (1960, 20, 20)


def test_blends_and_per_split_paths(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b", documents=2)
    assert check_training_data(["0.3", a, "0.7", b], "50,50,0", 10).documents == 102
    summary = check_training_data(
        None, vocab_size=10, train_data_path=[a, b], valid_data_path=["1.0", b]
    )
    assert [dataset.split_documents for dataset in summary.datasets] == [
        (100, 0, 0),
        (2, 0, 0),
        (0, 2, 0),
    ]
    assert check_training_data(["s3://bucket/data"], "98,1,1", 10).datasets == ()


def test_the_data_gpt_dataset_serves_is_what_is_promised(tmp_path: Path) -> None:
    """Megatron's own builder hands each split the documents that the summary says."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    path = make(tmp_path / "a", documents=57)
    split = "90,7,3"
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=8,
        blend=([path], None),
        split=split,
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=NullTokenizer(100),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    built = BlendedMegatronDatasetBuilder(GPTDataset, [4, 1, 1], lambda: True, config).build()
    (dataset,) = check_training_data([path], split, 100).datasets
    assert dataset.split_documents == tuple(len(part.indices) for part in built)


@pytest.mark.parametrize("values", [None, []])
def test_no_data_path(values: list[str] | None) -> None:
    with pytest.raises(ValueError, match=r"^data_path \(not given\) must name .*--mock-data"):
        check_training_data(values, "98,1,1", 10)


def test_two_ways_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data_path \(given\) must not be combined"):
        check_training_data(["a"], "98,1,1", 10, test_data_path=["b"])


def test_missing_files(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    with pytest.raises(ValueError, match=r"^data_path \(.*none\) must be a complete .*missing too"):
        check_training_data([str(tmp_path / "none")], "98,1,1", 10)
    idx_path(path).rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"a\.idx is missing \(a\.bin exists\)"):
        check_training_data([path], "98,1,1", 10)
    (tmp_path / "kept").rename(idx_path(path))
    bin_path(path).unlink()
    with pytest.raises(ValueError, match=r"valid_data_path .*a\.bin is missing \(a\.idx exists\)"):
        check_training_data(None, None, 10, valid_data_path=[path])


def test_a_forgotten_ending_is_guessed(tmp_path: Path) -> None:
    make(tmp_path / "corpus_text_document")
    with pytest.raises(ValueError, match=r"Did you mean .*/corpus_text_document\?"):
        check_training_data([str(tmp_path / "corpus")], "98,1,1", 10)


@pytest.mark.parametrize("kept", [0, 10, 1998])
def test_truncated_tokens(tmp_path: Path, kept: int) -> None:
    path = make(tmp_path / "a")
    bin_path(path).write_bytes(bin_path(path).read_bytes()[:kept])
    message = rf"a\.bin is truncated: {kept} bytes, but a\.idx needs 2000"
    with pytest.raises(ValueError, match=message):
        check_training_data([path], "98,1,1", 10)


def test_zero_bytes_and_zero_documents(tmp_path: Path) -> None:
    path = tmp_path / "a"
    bin_path(path).touch()
    idx_path(path).touch()
    with pytest.raises(ValueError, match=r"a\.idx is truncated: 0 bytes"):
        check_training_data([str(path)], "98,1,1", 10)
    header = HEADER.pack(MAGIC, 1, 8, 0, 1)
    idx_path(path).write_bytes(header + np.zeros(1, "<i8").tobytes())
    with pytest.raises(ValueError, match="at least one document with a token; it has 0 documents"):
        check_training_data([str(path)], "98,1,1", 10)


def test_a_token_beyond_the_vocabulary(tmp_path: Path) -> None:
    path = make(tmp_path / "a", largest=50)
    check_training_data([path], "98,1,1", 51)
    with pytest.raises(
        ValueError, match=r"below the tokenizer's vocabulary \(50\); it has .* 50\."
    ):
        check_training_data([path], "98,1,1", 50)
    wide = make(tmp_path / "b", largest=69_999, vocab_size=70_000)
    with pytest.raises(ValueError, match=r"it has the token 69999\."):
        check_training_data([wide], "98,1,1", 69_999)
    # A negative id can only come from another writer.
    tokens = np.fromfile(bin_path(wide), "<i4")
    tokens[5] = -3
    tokens.tofile(bin_path(wide))
    with pytest.raises(ValueError, match=r"it has the token -3\."):
        check_training_data([wide], "98,1,1", 70_000)


def test_a_vocabulary_that_the_dtype_cannot_hold(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    check_training_data([path], "98,1,1", 65_536)
    with pytest.raises(
        ValueError, match=r"holds uint16 tokens, but the tokenizer has 65537 pieces"
    ):
        check_training_data([path], "98,1,1", 65_537)


def test_tokens_that_are_no_integers(tmp_path: Path) -> None:
    path = tmp_path / "a"
    bin_path(path).write_bytes(np.ones(3, "<f4").tobytes())
    header = HEADER.pack(MAGIC, 1, 7, 1, 2)
    rows = [np.array([3], "<i4"), np.array([0], "<i8"), np.array([0, 1], "<i8")]
    idx_path(path).write_bytes(header + b"".join(row.tobytes() for row in rows))
    with pytest.raises(ValueError, match="must hold integer tokens, not float32"):
        check_training_data([str(path)], "98,1,1", 10)


@pytest.mark.parametrize(
    ("split", "documents", "name"),
    # Five documents at 80,10,10 are the case known to hang.
    [
        ("80,10,10", 5, "valid"),
        ("98,1,1", 40, "test"),
        (None, 100, "test"),
        ("1,0,99", 50, "train"),
    ],
)
def test_a_split_without_a_document(
    tmp_path: Path, split: str | None, documents: int, name: str
) -> None:
    path = make(tmp_path / "a", documents=documents)
    with pytest.raises(ValueError, match=rf"must give the {name} split a document") as error:
        check_training_data([path], split, 10)
    message = str(error.value)
    assert f"of {documents} documents, which comes to none" in message
    assert "Megatron would wait for ever" in message
    assert f"weight 0 turns {name} off" in message
    needed = int(message.split("Use at least ")[1].split()[0])
    assert needed > documents
    check_training_data([make(tmp_path / "b", documents=needed)], split, 10)


def test_a_large_file_is_sampled_in_blocks(tmp_path: Path, monkeypatch) -> None:
    import megatron_satformer.data.training.preflight as preflight

    monkeypatch.setattr(preflight, "SCAN_BLOCK", 10)
    path = make(tmp_path / "a", documents=1000, largest=50)
    for scan_tokens in (1, 100, 10_000):
        with pytest.raises(ValueError, match="it has the token 50"):
            check_training_data([path], "98,1,1", 50, scan_tokens=scan_tokens)


@pytest.mark.slow
def test_any_flipped_bit_of_an_index_is_found(tmp_path: Path) -> None:
    """A boundary beside an empty document may move and still be one: all else must be told."""
    prefix = tmp_path / "a"
    write_dataset(prefix, range(50), [3, 0, 17, 1, 29])
    whole = idx_path(prefix).read_bytes()
    true = IndexedFile(prefix)
    tokens, lengths = true.tokens.tolist(), true.lengths.tolist()
    found = 0
    for at in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << bit
            idx_path(prefix).write_bytes(flipped)
            try:
                check_training_data([str(prefix)], "100,0,0", 100)
            except ValueError as error:
                assert str(error).startswith("data_path (")  # noqa: PT017
                found += 1
            else:
                read = IndexedFile(prefix)
                assert read.dtype == true.dtype
                assert (read.tokens.tolist(), read.lengths.tolist()) == (tokens, lengths)
    assert found > 8 * len(whole) - 16


def test_any_cut_of_a_file_is_found(tmp_path: Path) -> None:
    path = make(tmp_path / "a", documents=4)
    for file in (idx_path(path), bin_path(path)):
        whole = file.read_bytes()
        for kept in range(len(whole)):
            file.write_bytes(whole[:kept])
            with pytest.raises(ValueError, match=r"truncated|damaged"):
                check_training_data([path], "100,0,0", 10)
        file.write_bytes(whole + b"\0")
        with pytest.raises(ValueError, match=r"damaged|not the file"):
            check_training_data([path], "100,0,0", 10)
        file.write_bytes(whole)


def test_a_weight_of_zero(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b")
    with pytest.raises(
        ValueError, match=r"^data_path \(0 .*\) must have weights above 0: .*/a has"
    ):
        check_training_data(["0", a, "1", b], "98,1,1", 10)


def test_a_split_beside_paths_per_split(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"^split \(98,1,1\) must not be given with data paths per"
    ):
        check_training_data(None, "98,1,1", 10, train_data_path=[path])


OPTIONS: dict[str, Any] = dict.fromkeys(
    (
        *("data_path", "train_data_path", "valid_data_path", "test_data_path", "split"),
        *("data_args_path", "per_split_data_args_path", "per_dataset_sequences_path"),
        *("multiple_validation_sets", "full_validation"),
    )
)


def test_paths_in_files(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b")
    listed, per_split = tmp_path / "list", tmp_path / "paths.json"
    listed.write_text(f"0.3 {a}\n0.7 {b}\n")
    options = OPTIONS | {"data_args_path": str(listed), "split": "98,1,1"}
    summary = check_data_options(options, 10)
    assert [(one.prefix, one.weight) for one in summary.datasets] == [(a, 0.3), (b, 0.7)]
    per_split.write_text(json.dumps({"train": f"1 {a} 2 {b}", "valid": [b], "test": None}))
    paths = read_data_paths(OPTIONS | {"per_split_data_args_path": str(per_split)})
    assert paths == {
        "data_path": None,
        "train_data_path": ["1", a, "2", b],
        "valid_data_path": [b],
        "test_data_path": None,
    }


@pytest.mark.parametrize(
    ("options", "content", "message"),
    [
        (
            {"data_args_path": "FILE", "split": "1"},
            None,
            r"^data_args_path \(.*\) must be a text f",
        ),
        (
            {"data_args_path": "FILE", "split": "1"},
            b"\xff",
            r"must be a text file that can be read",
        ),
        (
            {"data_args_path": "FILE"},
            b"a",
            r"^split \(not given\) must be given with data_args_path",
        ),
        ({"data_args_path": "FILE", "data_path": ["a"]}, b"a", r"must not be combined with data_p"),
        ({"per_split_data_args_path": "FILE"}, b"{", r"must be JSON: Expecting .* Mend it\.$"),
        ({"per_split_data_args_path": "FILE"}, b"[]", r"must hold one JSON object"),
        ({"per_split_data_args_path": "FILE"}, b'{"train": []}', r'must give "valid" a list of'),
        ({"per_split_data_args_path": "FILE"}, b'{"train": [1]}', r'must give "train" a list of'),
        (
            {"per_split_data_args_path": "FILE", "test_data_path": ["a"]},
            b"{}",
            r"must not be combined with train_data_path",
        ),
        ({"multiple_validation_sets": True}, b"", r"must come with --full-validation"),
        (
            {"multiple_validation_sets": True, "full_validation": True, "data_path": ["a"]},
            b"",
            r"must come with --valid-data-path",
        ),
    ],
)
def test_paths_that_are_refused(
    tmp_path: Path, options: dict, content: bytes | None, message: str
) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    given = {name: str(file) if value == "FILE" else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        check_data_options(OPTIONS | given, 10)


def test_counts_that_megatron_takes_for_the_headers(tmp_path: Path) -> None:
    """With --per-dataset-sequences-path Megatron reads no header and guesses the dtype."""
    path = make(tmp_path / "a")
    wide = make(tmp_path / "wide", vocab_size=70_000)
    file = tmp_path / "counts.json"
    for counts in ({}, {path: [100, 100]}):
        file.write_text(json.dumps(counts))
        with pytest.raises(
            ValueError, match=r"^per_dataset_sequences_path .* must give \[100, 101"
        ):
            check_training_data([path], "1", 10, per_dataset_sequences_path=str(file))
    file.write_text(json.dumps({path: [100, 101], wide: [100, 101]}))
    check_training_data([path], "1", 10, per_dataset_sequences_path=str(file))
    check_training_data([wide], "1", 70_000, per_dataset_sequences_path=str(file))
    with pytest.raises(ValueError, match=r"read the int32 tokens as uint16, by the vocab.* \(10\)"):
        check_training_data([wide], "1", 10, per_dataset_sequences_path=str(file))


def test_a_byte_that_differs_from_the_manifest_is_found(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    tokens, index = (
        Checksum(p.stat().st_size, file_sha256(p)) for p in (bin_path(path), idx_path(path))
    )
    record_dataset(manifest_path(path), "a", describe_dataset(100, 1000, "uint16", [tokens], index))
    assert check_training_data([path], "98,1,1", vocab_size=10).tokens == 1000
    content = bytearray(bin_path(path).read_bytes())
    content[400] ^= 1  # 0 becomes 1: both are in the vocabulary
    bin_path(path).write_bytes(content)
    message = r"data_path .* must be what its manifest describes: .*a\.bin"
    with pytest.raises(ValueError, match=message):
        check_training_data([path], "98,1,1", vocab_size=10)
    manifest_path(path).unlink()
    assert check_training_data([path], "98,1,1", vocab_size=10).tokens == 1000
