"""The data of real runs of pretrain_satformer.py: damaged, and opened by two launches at once."""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.datasets import write_dataset
from tests.small import PP2, SHAPE

FLAGS = [*SHAPE, "--tokenizer-type", "NullTokenizer", "--vocab-size", "100", "--train-iters", "3"]


def make(prefix: Path, seed: int = 0) -> str:
    random = np.random.default_rng(seed)
    lengths = random.integers(20, 200, 200)
    return write_dataset(prefix, random.integers(0, 90, lengths.sum()), lengths)


def flags_of(folder: Path) -> list[str]:
    blend = ["0.4", make(folder / "a"), "0.6", make(folder / "b", 1)]
    cache = ["--data-cache-path", str(folder / "cache")]
    return [*FLAGS, "--data-path", *blend, "--split", "80,10,10", *cache]


def test_a_run_states_its_epochs_and_mends_its_cache(pretrain: Callable, tmp_path: Path) -> None:
    flags = [*flags_of(tmp_path), *PP2.split()]
    first = pretrain(2, *flags)
    assert "> train: 24 samples of 2 data sets\n>   14 samples = 0.0" in first.output
    assert "> cache: building 9 of 9 indices in" in first.output
    for path in (tmp_path / "cache").glob("*shuffle_index.npy"):
        content = bytearray(path.read_bytes())
        content[-3] ^= 64
        path.write_bytes(content)
    for path in (tmp_path / "cache").glob("*dataset_index.npy"):
        path.write_bytes(path.read_bytes()[:50])
    second = pretrain(2, *flags)
    assert second.output.count("shuffle_index.npy is damaged") == 6
    assert second.output.count("dataset_index.npy has 50 bytes instead of") == 3
    assert second.losses == first.losses
    third = pretrain(2, *flags)
    assert "> cache" not in third.output
    assert third.losses == first.losses


def test_two_launches_at_once(on_ranks: Callable, pretrain: Callable, tmp_path: Path) -> None:
    """New, then half-written as a kill leaves it under Megatron alone."""
    flags = flags_of(tmp_path)
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    for _ in range(2):
        on_ranks(2, f"{__name__}:launch", flags, ports)
        files = [*(tmp_path / "cache").glob("*index.npy")]
        assert len(files) == 6 * 3 + 3 * 2
        for path in files[::2]:
            path.write_bytes(path.read_bytes()[:-10])
    assert len(pretrain(1, *flags).losses) == 3


def launch(flags: list[str], ports: list[int]) -> None:
    """One process is one launch of its own."""
    import pretrain_satformer

    port = ports[int(os.environ["RANK"])]
    os.environ |= {"MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0"}
    os.environ |= {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    sys.argv = ["pretrain_satformer.py", *flags]
    pretrain_satformer.main()


def test_samples_that_are_known_late_are_prepared_too(pretrain: Callable, tmp_path: Path) -> None:
    flags = flags_of(tmp_path)
    for option in ("--train-iters", "--global-batch-size"):
        at = flags.index(option)
        del flags[at : at + 2]
    schedule = ["--step-batch-size-schedule", "0:4,512:8", "--train-samples", 24]
    output = pretrain(1, *flags, *schedule).output
    counted = output.index("setting training iterations to 4")
    assert counted < output.index("> train: 24 samples of 2 data sets")
    assert len([*(tmp_path / "cache").glob("*checksums.json")]) == 9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--split 100,0,0", "eval_iters must be 0 where the valid split has no data"),
        ("--train-iters 9000", "without weights Megatron serves one epoch"),
        ("--data-cache-path FOLDER/a.bin", "must be a folder that can be written to"),
        ("--seq-length 64 --split 98,1,1", "65 tokens, of the valid split; it has"),
    ],
)
def test_refused_before_any_work(
    pretrain: Callable, tmp_path: Path, flags: str, message: str
) -> None:
    paths = [make(tmp_path / "a"), make(tmp_path / "b", 1)]
    write_dataset(tmp_path / "short", range(90), [1] * 90)
    if "98,1,1" in flags:
        paths = [str(tmp_path / "short")]
    given = [*FLAGS, "--split", "80,10,10", "--data-cache-path", tmp_path / "cache"]
    given += ["--data-path", *paths, *flags.replace("FOLDER", str(tmp_path)).split()]
    output = pretrain(1, *given, code=2).output
    (line,) = [line for line in output.splitlines() if "error" in line.lower().split(": ")]
    assert message in line
    assert "initialized" not in output
