import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_satformer.data.datasets import indexed, merge
from megatron_satformer.data.datasets.indexed import (
    IndexedFile,
    bin_path,
    idx_path,
)
from megatron_satformer.data.datasets.manifest import (
    Checksum,
    describe_dataset,
    manifest_path,
    read_manifest,
    record_dataset,
)
from megatron_satformer.data.datasets.merge import merge_datasets
from megatron_satformer.data.datasets.verify import verify_dataset
from megatron_satformer.files.atomic import AtomicFile
from tests.datasets import write_dataset


def make(prefix: Path, seed: int, documents: int = 20, vocab_size: int = 100) -> str:
    """One sequence per document, empty documents among them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 4, size=documents)
    return write_dataset(prefix, rng.integers(0, 100, size=lengths.sum()), lengths, vocab_size)


def make_in_sequences(prefix: Path) -> str:
    """Documents of several sequences, of none, and an empty sequence, made by Megatron."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(bin_path(prefix)), np.uint16)
    for lengths in ([2, 3], [], [1], [0, 4], []):
        builder.add_document(np.arange(sum(lengths)), lengths)
    builder.finalize(str(idx_path(prefix)))
    return str(prefix)


def merge_with_megatron(prefixes: list[str], output: Path) -> None:
    """What Megatron-LM's tool does with its sorted prefixes."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(bin_path(output)), IndexedFile(prefixes[0]).dtype.type)
    for prefix in prefixes:
        builder.add_index(prefix)
    builder.finalize(str(idx_path(output)))


def content(prefix: Path) -> tuple[bytes, bytes]:
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()


def checksum(data: bytes) -> dict[str, int | str]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def cannot(*args: int) -> int:
    raise OSError(errno.EXDEV, "two file systems")


@pytest.mark.parametrize(
    "copy",
    [
        pytest.param(None, marks=pytest.mark.slow, id="in the kernel"),
        pytest.param(cannot, id="other file systems"),
        pytest.param(lambda *args: 0, marks=pytest.mark.slow, id="nothing copied"),
    ],
)
def test_bytes_equal_megatrons_in_small_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: Callable[..., int] | None
) -> None:
    monkeypatch.setattr(indexed, "BLOCK", 7)
    monkeypatch.setattr(merge, "STEP", 11)
    monkeypatch.setattr(merge, "FLUSH", 30)
    if copy is not None:
        monkeypatch.setattr(os, "copy_file_range", copy)
    folder = tmp_path / "in"
    folder.mkdir()
    # Sorted by the prefix and not by the file name; what is no data set is passed over.
    made = [make(folder / "b", 1), make_in_sequences(folder / "a.2"), make(folder / "a", 2)]
    made.append(make(folder / "none", 3, documents=0))
    (folder / "README").write_text("")
    (folder / "a").mkdir()
    merge_with_megatron(sorted(set(made) - {made[-1]}) + [made[-1]], tmp_path / "theirs")
    summary = merge_datasets([str(folder)], str(tmp_path / "ours"))
    assert content(tmp_path / "ours") == content(tmp_path / "theirs")
    assert (summary.datasets, summary.documents) == (4, 45)
    entry = read_manifest(manifest_path(tmp_path / "ours"))["datasets"]["ours"]
    tokens, index = content(tmp_path / "ours")
    assert entry["idx"] == checksum(index)
    parts = [content(prefix)[0] for prefix in (*sorted(set(made) - {made[-1]}), made[-1])]
    assert entry["bin"] == {"bytes": len(tokens), "parts": [checksum(part) for part in parts]}

    # Prefixes keep their order.
    merge_with_megatron(made[:3], tmp_path / "theirs")
    merge_datasets(made[:3], str(tmp_path / "ours"), overwrite=True, sha256=False)
    assert content(tmp_path / "ours") == content(tmp_path / "theirs")
    assert not manifest_path(tmp_path / "ours").exists()


def test_checksums_travel_with_the_data(tmp_path: Path) -> None:
    """What changed in an input since it was made is found in what it was merged into."""
    inputs = [make(tmp_path / name, seed) for seed, name in enumerate("abc")]
    merge_datasets(inputs[:2], str(tmp_path / "ab"))
    merged = content(tmp_path / "ab")[0]
    changed = bytearray(merged)
    changed[len(content(inputs[0])[0])] ^= 1
    bin_path(tmp_path / "ab").write_bytes(changed)
    merge_datasets([str(tmp_path / "ab"), inputs[2]], str(tmp_path / "abc"))
    entry = read_manifest(manifest_path(tmp_path / "abc"))["datasets"]["abc"]
    parts = [content(prefix)[0] for prefix in inputs]
    assert entry["bin"]["parts"] == [checksum(part) for part in parts]
    message = rf"abc\.bin is not .* bytes from {len(parts[0])} on one changed"
    with pytest.raises(ValueError, match=message):
        verify_dataset(IndexedFile(tmp_path / "abc"))
    assert verify_dataset(IndexedFile(inputs[0])).manifest is None
    # an input that is not what its manifest says is not merged
    entry = describe_dataset(1, 2, "uint16", [Checksum(4, "0" * 64)], Checksum(9, "0" * 64))
    record_dataset(manifest_path(inputs[2]), "c", entry)
    with pytest.raises(ValueError, match=r"input .*c\) must be a complete data set: .*describes"):
        merge_datasets(inputs, str(tmp_path / "all"))
    assert not bin_path(tmp_path / "all").exists()


def test_a_manifest_keeps_what_else_it_describes(tmp_path: Path) -> None:
    inputs = [make(tmp_path / "a", 1), make(tmp_path / "b", 2)]
    path = manifest_path(tmp_path / "all")
    merge_datasets(inputs, str(tmp_path / "all_text_document"))
    manifest_path(tmp_path / "all_text_document").rename(path)
    merge_datasets(inputs, str(tmp_path / "all"))
    assert sorted(read_manifest(path)["datasets"]) == ["all", "all_text_document"]
    merge_datasets(inputs, str(tmp_path / "all_text_document"), True, sha256=False)
    assert sorted(read_manifest(path)["datasets"]) == ["all"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: bin_path(d / "b").unlink(), r"b\.bin is missing \(b\.idx exists\)"),
        (lambda d: idx_path(d / "b").unlink(), r"b\.idx is missing \(b\.bin exists\)"),
        (lambda d: bin_path(d / "b").write_bytes(b"12"), r"b\.bin is truncated: 2 bytes"),
        (lambda d: (d / "b.bin.partial").touch(), r"b\.bin\.partial is being written, or was"),
        (
            lambda d: make(d / "c", 3, vocab_size=70_000),
            r"c\.idx\) holds int32 tokens, but .*a\.idx holds uint16: .* with the same tokenizer",
        ),
        (lambda d: (d / "c.idx").symlink_to(d / "b.idx"), r"c\) must be named once; .*b is the"),
        (lambda d: make(d.parent / "in", 3), r"must be one thing, .* Write .*in/ for the folder"),
        (lambda d: [path.unlink() for path in d.iterdir()], "there is no .idx file in it"),
        (lambda d: d.rename(d.parent / "moved"), r"in/\) must be a folder, but there is none"),
    ],
)
def test_input_that_cannot_be_merged(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "in"
    make(folder / "a", 1)
    make(folder / "b", 2)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        merge_datasets([f"{folder}{'/' * (not folder.exists())}"], str(tmp_path / "out" / "all"))
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    inputs = [make(tmp_path / "a", 1), make(tmp_path / "b", 2)]
    before = content(tmp_path / "b")
    for output, overwrite, message in (
        (tmp_path / "b", True, r"^output_prefix .*b\) must not be among the inputs"),
        (tmp_path / "b", False, "must not be among the inputs"),
        (f"{tmp_path}/", False, "must end in a name"),
        (tmp_path / "c.bin", False, r"Use .*/c\."),
    ):
        with pytest.raises(ValueError, match=message):
            merge_datasets(inputs, str(output), overwrite)
    with pytest.raises(ValueError, match=r"b\.idx exists already. Pass --overwrite"):
        merge_datasets(inputs[:1], inputs[1])
    assert content(tmp_path / "b") == before


def test_no_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [make(tmp_path / "a", 1), make(tmp_path / "b", 2)]
    before = sorted(os.listdir(tmp_path))
    needed = IndexedFile(inputs[0]).tokens.nbytes + IndexedFile(inputs[1]).tokens.nbytes
    needed += sum(idx_path(prefix).stat().st_size for prefix in inputs) - 34 - 8
    for free in (needed, needed - 1):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        if free == needed:
            summary = merge_datasets(inputs, str(tmp_path / "out" / "fits"))
            assert summary.bytes == needed == sum(map(len, content(tmp_path / "out" / "fits")))
            shutil.rmtree(tmp_path / "out")
        else:
            with pytest.raises(
                ValueError, match=r"must have room for 0\.000 GB; .* free. Make room"
            ):
                merge_datasets(inputs, str(tmp_path / "out" / "fits"))
    assert sorted(os.listdir(tmp_path)) == before


def test_a_full_disk_leaves_the_old_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [make(tmp_path / "a", 1), make(tmp_path / "b", 2)]
    old = make(tmp_path / "all", 3)
    before = sorted(os.listdir(tmp_path)), content(Path(old))

    def full(*args: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        # What a disk says of bytes that it took before.
        patch.setattr(merge, "FLUSH", 1)
        patch.setattr(os, "fdatasync", full)
        with pytest.raises(OSError, match="No space left on device"):
            merge_datasets(inputs, old, overwrite=True)
    assert (sorted(os.listdir(tmp_path)), content(Path(old))) == before
    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.bin' -> '.*all\.bin\.p"):
        merge_datasets(inputs, old, overwrite=True)
    assert (sorted(os.listdir(tmp_path)), content(Path(old))) == before


def test_a_kill_between_the_two_renames_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [make(tmp_path / "a", 1), make(tmp_path / "b", 2)]
    publish = AtomicFile.publish

    def kill_before_the_index(self: AtomicFile) -> None:
        if self.path.suffix == ".idx":
            raise KeyboardInterrupt
        publish(self)

    with monkeypatch.context() as patch:
        patch.setattr(AtomicFile, "publish", kill_before_the_index)
        patch.setattr(AtomicFile, "discard", lambda self: self.file.close())
        with pytest.raises(KeyboardInterrupt):
            merge_datasets(parts, str(tmp_path / "all"))
    assert sorted(p.name for p in tmp_path.glob("all*")) == ["all.bin", "all.idx.partial"]
    merge_datasets(parts, str(tmp_path / "all"))
    assert IndexedFile(tmp_path / "all").documents == 40


def test_two_writers_of_one_output_cannot_mix(tmp_path: Path) -> None:
    part = make(tmp_path / "a", 1)
    with (
        AtomicFile(tmp_path / "all.bin"),
        pytest.raises(ValueError, match="being written by another process"),
    ):
        merge_datasets([part], str(tmp_path / "all"))


def test_the_tool(tmp_path: Path, tool: Callable, fails: Callable[..., str]) -> None:
    make(tmp_path / "in" / "a", 1)
    make(tmp_path / "in" / "b", 2)
    flags = ("--input", tmp_path / "in", "--output-prefix", tmp_path / "all")
    assert "multimodal (True) is not supported" in fails("merge_datasets", *flags, "--multimodal")
    result = tool("merge_datasets", *flags)
    assert result.returncode == 0, result
    assert result.stdout.startswith("2 data sets, 40 documents, ")
    assert IndexedFile(tmp_path / "all").documents == 40
    assert verify_dataset(IndexedFile(tmp_path / "all")).manifest is not None
    result = tool("merge_datasets", *flags, "--overwrite", "--no-sha256")
    assert result.returncode == 0, result
    assert not manifest_path(tmp_path / "all").exists()
