"""Folders of datasets, as the package datasets writes them and the hub lays them out."""

import json
import os
from pathlib import Path

import pytest

from megatron_satformer.data.reading.documents import read_documents
from megatron_satformer.data.reading.inputs import find_inputs

arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
ipc = pytest.importorskip("pyarrow.ipc")


def write_shard(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = arrow.table({"text": list(texts)})
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
        return
    with path.open("wb") as file, ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def save_dataset(folder: Path, *shards: str) -> Path:
    """What Dataset.save_to_disk leaves, with one document a shard; the order is the list's."""
    names = [f"data-{n:05}-of-{len(shards):05}.arrow" for n in reversed(range(len(shards)))]
    for name, text in zip(names, shards, strict=True):
        write_shard(folder / name, text)
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def texts_of(*values: object) -> list[str]:
    sources = find_inputs([str(value) for value in values]).sources
    return [text for (text,) in read_documents(sources, ["text"])]


def test_a_saved_dataset_is_read_in_its_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_dataset(tmp_path / "saved", "first", "second", "third")
    write_shard(folder / "cache-0123abcd.arrow", "what a map left")
    assert texts_of(folder) == ["first", "second", "third"]
    assert "note: 3 beside the data are not read" in capsys.readouterr().err
    # Also among others, in a folder of corpora.
    (tmp_path / "zebra.jsonl").write_text('{"text": "last"}\n')
    save_dataset(tmp_path / "other", "zero")
    assert texts_of(tmp_path) == ["zero", "first", "second", "third", "last"]


def test_what_datasets_itself_writes_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": [f"{n} é" for n in range(50)], "n": range(50)})
    data.save_to_disk(tmp_path / "one", num_shards=3)
    assert texts_of(tmp_path / "one") == data["text"][:]
    splits = datasets.DatasetDict({"train": data, "test": data})
    splits.save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match="a dataset of 2 splits: train"):
        find_inputs([tmp_path / "two"])
    assert texts_of(tmp_path / "two" / "train") == data["text"][:]


def test_other_files_of_a_saved_dataset_are_named(tmp_path: Path) -> None:
    folder = save_dataset(tmp_path / "saved", "first")
    write_shard(folder / "data-00007-of-00009.arrow", "of an earlier save")
    with pytest.raises(ValueError, match=r"00007-of-00009\.arrow \(the dataset in .* doe"):
        find_inputs([folder])
    (folder / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(ValueError, match=r"lacks data-00000-of-00001\.arrow, which its state"):
        find_inputs([folder])
    (folder / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"state\.json lists no data files"):
        find_inputs([folder])


def test_splits_are_never_mixed_without_a_word(tmp_path: Path) -> None:
    folder = tmp_path / "dict"
    save_dataset(folder / "train", "to learn")
    save_dataset(folder / "test", "to evaluate")
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="All of them together would train on what evaluates") as e:
        find_inputs([folder])
    assert f"2 splits: train ({folder}/train), test ({folder}/test)" in str(e.value)
    assert texts_of(folder / "train") == ["to learn"]
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ValueError, match=r"the dataset in .* does not name it"):
        find_inputs([folder])
    assert len(find_inputs([folder], on_unknown="skip").sources) == 1


def make_snapshot(root: Path, *names: str) -> Path:
    """A repository in the hub's cache: files are links into blobs."""
    snapshot = root / "datasets--a--b" / "snapshots" / "0123"
    for number, name in enumerate(names):
        blob = root / "datasets--a--b" / "blobs" / f"sha{number}"
        write_shard(blob.with_suffix(".parquet"), name)
        blob.with_suffix(".parquet").rename(blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


def test_a_snapshot_of_one_split_is_read_in_order(tmp_path: Path) -> None:
    names = [f"data/train-0000{n}-of-00003.parquet" for n in range(3)]
    snapshot = make_snapshot(tmp_path, *names)
    assert texts_of(snapshot) == names
    with pytest.raises(ValueError, match=f"Name a snapshot in it: {snapshot}"):
        find_inputs([tmp_path / "datasets--a--b"])


@pytest.mark.parametrize(
    ("train", "test", "give"),
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "data/train*"),
        ("en/train/0000.parquet", "en/validation/0000.parquet", "en/train"),
        ("train.parquet", "dev.parquet", "train*"),
        ("wiki-train.parquet", "wiki-test.parquet", "wiki-train*"),
    ],
)
def test_a_snapshot_of_splits_names_them(train: str, test: str, give: str, tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path, train, test)
    with pytest.raises(ValueError, match="a dataset of 2 splits") as error:
        find_inputs([snapshot])
    assert f"train ({snapshot}/{give})" in str(error.value)
    assert texts_of(snapshot / give) == [train]


CARD = """---
license: mit
configs:
{}
---
# A dataset
"""


def test_a_card_says_what_is_data(tmp_path: Path) -> None:
    names = ["b/x.parquet", "a/y.parquet", "sample/z.parquet"]
    snapshot = make_snapshot(tmp_path, *names)
    card = snapshot / "README.md"
    one = "- config_name: default\n  data_files:\n  - split: train\n    path: {}"
    card.write_text(CARD.format(one.format("['b/*', 'a/*.parquet']")))
    with pytest.raises(ValueError, match=r"sample/z\.parquet \(the dataset in .* does no"):
        find_inputs([snapshot])
    found = find_inputs([snapshot], on_unknown="skip")
    texts = [text for (text,) in read_documents(found.sources, ["text"])]
    assert sorted(texts) == sorted(names[:2])
    assert [Path(one.path).name for one in found.unread] == ["z.parquet"]
    two = "- config_name: default\n  data_files: '[ab]/*'\n- config_name: small\n  data_dir: sample"
    card.write_text(CARD.format(two))
    with pytest.raises(ValueError, match="2 splits") as error:
        find_inputs([snapshot])
    assert f"default/train ({snapshot}/[ab]/*), small ({snapshot}/sample" in str(error.value)
    card.write_text(CARD.format(one.format("'none-*'")))
    with pytest.raises(ValueError, match=r"lacks the files that its README\.md names \(none-\*\)"):
        find_inputs([snapshot])
    card.write_text(CARD.format("- nonsense"))
    with pytest.raises(ValueError, match=r"README\.md has a header that is no dataset card"):
        find_inputs([snapshot])
    card.write_text("# No header: the names alone\n")
    assert sorted(texts_of(snapshot)) == sorted(names)
