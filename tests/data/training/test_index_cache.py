"""Megatron's own builder plans, builds and reads; every fault here is a real file's."""

import dataclasses
import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_satformer.data.training.index_cache import (
    IndexSet,
    checksum_file,
    find_fault,
    find_index_sets,
    plan_config,
    prepare_index_sets,
)
from tests.datasets import write_dataset

SAMPLES = (40, 8, 4)
SPLIT = "80,10,10"


def make(prefix: Path, seed: int = 0, documents: int = 60) -> str:
    random = np.random.default_rng(seed)
    lengths = random.integers(5, 60, documents)
    return write_dataset(prefix, random.integers(0, 100, lengths.sum()), lengths)


def make_config(cache: Path | None, *values: object, **options: Any) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.datasets.utils import get_blend_from_list
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    if values:
        options |= {"blend": get_blend_from_list([*map(str, values)]), "split": SPLIT}
    return GPTDatasetConfig(
        random_seed=1,
        sequence_length=32,
        path_to_cache=None if cache is None else str(cache),
        tokenizer=NullTokenizer(100),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        **options,
    )


def build(config: Any, samples: tuple = SAMPLES) -> list[Any]:
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset

    return BlendedMegatronDatasetBuilder(GPTDataset, samples, lambda: True, config).build()


def index_sets(config: Any, samples: tuple = SAMPLES) -> list[IndexSet]:
    return find_index_sets(build(plan_config(config), samples), config.path_to_cache)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def prepare(config: Any, samples: tuple = SAMPLES) -> list[str]:
    """Prepares, and returns what was printed."""
    told: list[str] = []
    prepare_index_sets(index_sets(config, samples), tell=told.append)
    return told


def one_set(sets: list[IndexSet], ending: str) -> IndexSet:
    return next(one for one in sets if ending in one.endings)


LAYOUTS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "one": lambda a, b: {"values": (a,)},
    "weights": lambda a, b: {"values": (0.3, a, 0.7, b)},
    "no weights": lambda a, b: {"values": (a, b, a)},
    "per split": lambda a, b: {"blend_per_split": [([a, b], [1.0, 2.0]), ([b], None), None]},
    "sets apart": lambda a, b: {
        "blend_per_split": [([a], None), ([a, b], None), None],
        "multiple_validation_sets": True,
        "full_validation": True,
        "samples": (40, None, 0),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("beside_the_data", [False, True])
def test_training_finds_every_index_there(
    tmp_path: Path, layout: str, beside_the_data: bool
) -> None:
    options = LAYOUTS[layout](make(tmp_path / "a"), make(tmp_path / "b", 1))
    samples = options.pop("samples", (40, 8, 4))
    values = options.pop("values", ())
    cache = None if beside_the_data else tmp_path / "cache"
    config = make_config(cache, *values, **options)
    sets = index_sets(config, samples)
    assert prepare_index_sets(sets, threads=2, tell=lambda line: None) == len(sets) > 0
    prepared = contents(tmp_path)
    build(config, samples)
    assert contents(tmp_path) == prepared
    assert prepare(config, samples) == []
    assert contents(tmp_path) == prepared
    if not beside_the_data:
        # And what is there is what Megatron makes by itself.
        build(dataclasses.replace(config, path_to_cache=str(tmp_path / "own")), samples)
        own, ours = (contents(tmp_path / name) for name in ("own", "cache"))
        assert len(own) > 0
        assert all(ours[name][0] == own[name][0] for name in own)


@pytest.fixture(scope="module")
def cache_of_a_blend(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("blend")
    config = make_config(folder / "cache", 0.3, make(folder / "a"), 0.7, make(folder / "b", 1))
    prepare(config)
    return config


@pytest.mark.parametrize("array", ["document_index", "dataset_index"])
def test_any_flipped_bit_and_any_cut_is_found(cache_of_a_blend: Any, array: str) -> None:
    config = cache_of_a_blend
    chosen = one_set(index_sets(config), f"{array}.npy")
    random = np.random.default_rng(0)

    def fault() -> str | None:
        return find_fault(chosen, checksum_file)

    assert fault() is None
    for ending in (*chosen.endings, "checksums.json"):
        path = chosen.path(ending)
        whole = path.read_bytes()
        for at in {0, 7, 9, 60, 130, *random.integers(0, len(whole), 20).tolist()}:
            if at < len(whole):
                flipped = bytearray(whole)
                flipped[at] ^= 1 << int(random.integers(8))
                path.write_bytes(flipped)
                assert fault(), (ending, at)
                path.write_bytes(whole[:at])
                assert fault(), (ending, at)
        path.unlink()
        assert fault(), ending
        path.write_bytes(whole)
    assert fault() is None


def test_damage_is_told_and_mended(cache_of_a_blend: Any) -> None:
    config = cache_of_a_blend
    before = contents(Path(config.path_to_cache))
    sets = index_sets(config)
    damaged = one_set(sets, "dataset_index.npy")
    path = damaged.path("dataset_index.npy")
    path.write_bytes(path.read_bytes()[:-1])
    told = prepare(config)
    assert len(told) == 2
    assert f"{damaged.base}-* is built again: dataset_index.npy has" in told[0]
    assert f"building 1 of {len(sets)} indices" in told[1]
    after = contents(Path(config.path_to_cache))
    assert {name: data for name, (data, _) in after.items()} == {
        name: data for name, (data, _) in before.items()
    }
    untouched = [name for name in after if not name.startswith(damaged.base.name)]
    assert all(after[name] == before[name] for name in untouched)


def test_an_index_of_data_made_again_since_is_not_used(tmp_path: Path) -> None:
    """Megatron names an index by the path of the data, whatever they hold."""
    config = make_config(tmp_path / "cache", make(tmp_path / "a"))
    prepare(config)
    make(tmp_path / "a", seed=5, documents=40)
    told = prepare(config)
    assert sum("a.idx is not the file it was made for" in line for line in told) == 3
    train = build(config)[0]
    assert train.document_index.max() < 40
    assert prepare(config) == []


def test_what_another_program_left_is_built_again(tmp_path: Path) -> None:
    config = make_config(tmp_path / "cache", make(tmp_path / "a"))
    build(config)
    for path in (tmp_path / "cache").glob("*sample_index.npy"):
        path.write_bytes(path.read_bytes()[:70])  # as after a kill
    assert sum("no checksums" in line for line in prepare(config)) == 3
    assert prepare(config) == []
    build(config)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = make_config(tmp_path / "file", make(tmp_path / "a"))
    message = r"^data_cache_path \(.*file\) must be a folder that can be written to, for 3 of"
    with pytest.raises(ValueError, match=message):
        prepare(config)


def test_a_blend_that_asks_more_than_megatron_builds(tmp_path: Path) -> None:
    config = make_config(
        tmp_path / "cache",
        0.5,
        make(tmp_path / "a"),
        0.5,
        make(tmp_path / "b"),
        mid_level_dataset_surplus=-0.5,
    )
    with pytest.raises(ValueError, match="mid_level_dataset_surplus may be increased"):
        prepare(config, (4000, 8, 4))
    assert not list((tmp_path / "cache").glob(".building-*"))


@pytest.mark.parametrize("calls", [("numpy", "save"), ("os", "replace")])
def test_a_kill_at_any_moment(zygote: Any, tmp_path: Path, calls: tuple[str, str]) -> None:
    data = make(tmp_path / "a")
    reference = make_config(tmp_path / "whole", data)
    prepare(reference)
    whole = {name: content for name, (content, _) in contents(tmp_path / "whole").items()}
    for moment in (0, 1, 4, 7):
        cache = tmp_path / f"killed {moment}"
        job = [str(cache), data, *calls, moment]
        run = zygote.run(1, call=f"{__name__}:prepare_and_die", args=job)
        assert run.codes == [-signal.SIGKILL], run.output
        (left,) = cache.glob(".building-*")
        os.utime(left, (0, 0))
        told = prepare(make_config(cache, data))
        assert told or calls == ("os", "replace")
        after = {name: content for name, (content, _) in contents(cache).items()}
        assert after == whole


def prepare_and_die(cache: str, data: str, module: str, function: str, moment: int) -> None:
    owner = {"numpy": np, "os": os}[module]
    real, calls = getattr(owner, function), iter(range(moment))

    def die(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, function, die)
    prepare(make_config(Path(cache), data))


def test_only_the_folders_of_killed_launches_go(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    names = ("killed", "living", "young")
    killed, living, young = (cache / f".building-{name}" for name in names)
    for folder in (killed, living, young):
        folder.mkdir(parents=True)
        (folder / "lock").touch()
    os.utime(killed, (0, 0))
    with (living / "lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(living, (0, 0))
        prepare(make_config(cache, make(tmp_path / "a")))
    assert not killed.exists()
    assert sorted(cache.glob(".building-*")) == [living, young]


def test_launches_at_the_same_time(on_ranks: Callable, tmp_path: Path) -> None:
    """Four processes, round after round: new, damaged, stale."""
    data = make(tmp_path / "a")
    cache = tmp_path / "cache"
    for round_ in range(4):
        if round_ == 2:
            for path in cache.glob("*.npy"):
                path.write_bytes(path.read_bytes()[:-8])
        if round_ == 3:
            make(tmp_path / "a", seed=round_)
        on_ranks(4, f"{__name__}:prepare_and_read", str(cache), data)
        assert not list(cache.glob(".building-*"))
    assert prepare(make_config(cache, data)) == []


def prepare_and_read(cache: str, data: str) -> None:
    config = make_config(Path(cache), data)
    prepare(config)
    own = build(dataclasses.replace(config, path_to_cache=f"{cache}-{os.getpid()}"))
    for mine, shared in zip(own, build(config), strict=True):
        assert len(mine) == len(shared)
        for index in range(len(mine)):
            assert (mine[index]["tokens"] == shared[index]["tokens"]).all()
