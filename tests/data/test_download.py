"""Downloading, from a folder on disk in place of the hub: the same streams, without a network."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_satformer.data import download as module
from megatron_satformer.data.download import DownloadOptions, download
from megatron_satformer.data.reading.inputs import find_inputs
from megatron_satformer.files.atomic import AtomicFile
from tests.texts import write_lines

ROOT = Path(__file__).resolve().parents[2]
COUNT = 300


@pytest.fixture(scope="module", params=["jsonl", "parquet"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of one hundred documents, with the columns of FineWeb-Edu that matter."""
    folder = tmp_path_factory.mktemp("dataset")
    for number in range(3):
        rows = [
            {"text": f"{n} \u65e5\u672c " + "word " * (n % 17), "token_count": n % 17 + 3, "id": n}
            for n in range(100 * number, 100 * number + 100)
        ]
        if request.param == "jsonl":
            write_lines(folder / f"train-{number}.jsonl", rows)
        else:
            table = pa.Table.from_pylist(rows)
            parquet.write_table(table, folder / f"train-{number}.parquet", row_group_size=30)
    return folder


@pytest.fixture
def options(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DownloadOptions:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return DownloadOptions(str(dataset), tmp_path / "whole", shard_bytes=3_000)


def texts(folder: Path) -> list[str]:
    files = sorted(folder.glob("part-*.jsonl"))
    return [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


def test_documents_come_whole_and_in_order_up_to_the_budget(
    options: DownloadOptions, tmp_path: Path
) -> None:
    whole = download(options)
    assert (whole.documents, whole.tokens, whole.exhausted) == (COUNT, 0, True)
    assert texts(tmp_path / "whole") == [
        f"{n} \u65e5\u672c " + "word " * (n % 17) for n in range(COUNT)
    ]
    sizes = [path.stat().st_size for path in sorted((tmp_path / "whole").glob("part-*"))]
    assert len(sizes) == whole.shards > 5
    assert sum(sizes) == whole.bytes
    assert min(sizes[:-1]) >= 3_000
    assert max(sizes) < 3_200
    # what preprocess_data reads of the folder are the shards alone
    assert [s.format for s in find_inputs([tmp_path / "whole"]).sources] == ["jsonl"] * len(sizes)

    some = replace(options, output=tmp_path / "some", tokens=1_000)
    count = download(some)
    assert 1_000 <= count.tokens < 1_020
    assert texts(tmp_path / "some") == texts(tmp_path / "whole")[: count.documents]
    again = download(some)
    assert again == replace(count, resumed=count.documents, seconds=again.seconds)
    # a larger budget goes on behind the last document
    more = download(replace(some, tokens=2_000))
    assert more.resumed == count.documents
    assert 2_000 <= more.tokens < 2_020
    assert texts(tmp_path / "some") == texts(tmp_path / "whole")[: more.documents]

    by_bytes = replace(options, output=tmp_path / "bytes", tokens=1_000, bytes_per_token=4.0)
    count = download(by_bytes)
    kept = texts(tmp_path / "bytes")
    assert sum(-(-len(text.encode()) // 4) for text in kept) == count.tokens >= 1_000


class Kill(BaseException):
    """Nothing of ours catches it."""


def test_a_kill_anywhere_changes_nothing(
    options: DownloadOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = replace(options, tokens=1_500)
    download(budget)
    killed = replace(budget, output=tmp_path / "killed")
    kills = 0
    while True:
        published, plain = [], AtomicFile.publish
        # Before or after the rename of the second file that a run writes, be it shard or state.
        after = bool(kills % 2)

        def publish(self: AtomicFile, published=published, plain=plain, after=after) -> None:
            published.append(self)
            if after:
                plain(self)
            if len(published) == 3:
                raise Kill
            if not after:
                plain(self)

        with monkeypatch.context() as patch:
            patch.setattr(AtomicFile, "publish", publish)
            try:
                download(killed)
                break
            except Kill:
                kills += 1
    assert kills >= 3
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_bad_input_is_one_clear_error(
    options: DownloadOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**changes: object) -> str:
        with pytest.raises(ValueError, match=r".") as error:
            download(replace(options, **changes))
        return str(error.value)

    counted = {"tokens": 100}
    assert "token_column (tokens) must be a column of" in refused(**counted, token_column="tokens")
    assert "it has id, text, token_count. Name another, or give --bytes" in refused(
        **counted, token_column="tokens", overwrite=True
    )
    told = refused(text_column="id", overwrite=True)
    assert "text_column (id) must hold text, but in document 1 it is int." in told
    assert "cannot be opened: " in refused(split="test", overwrite=True)
    assert "tokens (0) must be more than 0." in refused(tokens=0)
    download(replace(options, overwrite=True))
    assert "shard_bytes (1000) was 3000 when this download began." in refused(shard_bytes=1_000)
    assert "counted_by (token_count) was None when this download began." in refused(tokens=9)
    shard = tmp_path / "whole/part-00002.jsonl"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"output ({shard}) must have " in refused()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    told = refused(output=tmp_path / "other", overwrite=True)
    assert "must be empty, or hold a download, but has notes.txt." in told
    assert (tmp_path / "other/notes.txt").read_text() == "mine"
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the package datasets" in refused()


@pytest.mark.slow
def test_the_tool_goes_on_after_a_kill(dataset: Path, tmp_path: Path) -> None:
    if any(dataset.glob("*.parquet")):
        pytest.skip("the same of either kind")
    command = [sys.executable, str(ROOT / "tools/download_dataset.py"), "--dataset", str(dataset)]
    command += ["--output", str(tmp_path / "out"), "--shard-bytes", "3000", "--tokens", "1M"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (tmp_path / "out/part-00000.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"300 documents, {sum(n % 17 + 3 for n in range(300)):,} tok")
    assert "WARNING: tokens (1,000,000) are more than the dataset has" in result.stderr
    rows = [json.loads(line) for file in sorted(dataset.iterdir()) for line in file.open()]
    assert texts(tmp_path / "out") == [row["text"] for row in rows]
    assert module.STATE in os.listdir(tmp_path / "out")
