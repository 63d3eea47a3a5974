"""Other data, or the same ids of another tokenizer, are not trained on unasked."""

import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from megatron_satformer.arguments import DATA_OPTIONS
from megatron_satformer.checkpoint.megatron.training_data import (
    ARGUMENT,
    NAMES,
    OPTIONS,
    describe_data,
    find_data_changes,
    record_data,
)
from megatron_satformer.data.training.preflight import check_training_data
from tests.small import SHAPE


def options(model, **given):
    values = {**dict.fromkeys(OPTIONS), "tokenizer_type": "SentencePieceTokenizer"}
    values |= {"tokenizer_model": str(model), "allow_data_change": None, "data_path": None}
    return Namespace(**values | {"seq_length": 64, "seed": 1234} | given)


def summary(prefix, weight=None):
    values = [str(prefix)] if weight is None else [str(weight), str(prefix)]
    return check_training_data(values, "90,5,5", 500)


@pytest.fixture
def corpus(data_flags, tmp_path):
    """A copy of the data set and its tokenizer: prefix and model."""
    prefix, model = data_flags[1], data_flags[data_flags.index("--tokenizer-model") + 1]
    for end in (".bin", ".idx"):
        shutil.copy(f"{prefix}{end}", tmp_path)
    shutil.copy(model, tmp_path)
    return tmp_path / Path(prefix).name, tmp_path / Path(model).name


def changes(before, now, described):
    return list(find_data_changes(now, before, described, 80))


def test_every_name_is_a_choice_of_the_flag():
    assert sorted(DATA_OPTIONS) == sorted(NAMES)


def test_data_that_moved_are_the_same(corpus, data_flags):
    args = options(data_flags[data_flags.index("--tokenizer-model") + 1])
    record_data(args, describe_data(args, summary(data_flags[1])))
    moved = options(corpus[1])
    assert not changes(args, moved, describe_data(moved, summary(corpus[0])))


def other_tokens(prefix, model):
    ids = np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r+")
    ids[7] ^= 1


def other_tokenizer(prefix, model):
    model.write_bytes(model.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("change", "name"), [(other_tokens, "data_path"), (other_tokenizer, "tokenizer")]
)
def test_what_was_replaced_in_its_place_is_found(corpus, change, name):
    args = options(corpus[1])
    record_data(args, describe_data(args, summary(corpus[0])))
    change(*corpus)
    [row] = changes(args, args, describe_data(args, summary(corpus[0])))
    assert row.option == name
    assert f"add --allow-data-change {name}" in str(row.refusal)
    allowed = options(corpus[1], allow_data_change=[name])
    [row] = changes(args, allowed, describe_data(allowed, summary(corpus[0])))
    assert row.refusal is None
    assert "from sample 81 on (allowed)" in row.meaning


def test_another_weight_or_option_is_found(corpus):
    args = options(corpus[1])
    record_data(args, describe_data(args, summary(corpus[0], 1.0)))
    now = options(corpus[1], seq_length=32, seed=1)
    found = changes(args, now, describe_data(now, summary(corpus[0], 2.0)))
    assert [row.option for row in found] == ["seq_length", "seed", "data_path"]
    assert all(row.refusal for row in found)


def test_a_checkpoint_without_the_record_is_compared_by_its_paths(corpus):
    args = options(corpus[1], data_path=["a"])
    assert not hasattr(args, ARGUMENT)
    now = options(corpus[1], data_path=["b"])
    [row] = changes(args, now, describe_data(now, None))
    assert (row.option, row.then, row.now) == ("data_path", ["a"], ["b"])
    assert not changes(args, args, describe_data(args, None))


@pytest.mark.slow
def test_a_run_on_other_data_is_refused_or_told(pretrain, data_flags, corpus, tmp_path):
    flags = [*SHAPE, *data_flags, "--train-iters", 4]
    pretrain(1, *flags, "--save", tmp_path / "saved", "--save-interval", 2, "--exit-interval", 2)
    other_tokens(*corpus)
    for manifest in corpus[0].parent.glob("*manifest*"):
        manifest.unlink()
    given = ["--load", tmp_path / "saved", "--data-path", corpus[0]]
    assert "data_path (" in pretrain(1, *flags, *given, code=2).output
    run = pretrain(1, *flags, *given, "--allow-data-change", "data_path")
    assert list(run.scalars("lm loss")) == [3, 4]
    assert "other data, from sample 17 on (allowed)" in run.output
