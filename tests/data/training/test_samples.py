from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_satformer.data.training.preflight import check_training_data
from megatron_satformer.data.training.samples import (
    Share,
    check_plan,
    describe_samples,
    plan_samples,
    planned_samples,
    samples_per_epoch,
    serve_samples,
)
from tests.data.training.test_index_cache import build, make, make_config

SEQUENCE = 32  # that of make_config


def share(prefix: str, tokens: int, weight: float | None = None) -> Share:
    return Share(f"data_path ({prefix})", prefix, weight, tokens)


ASKED: list[dict[str, Any]] = [
    {"train_iters": 100},
    {"train_iters": 100, "eval_interval": 7, "start_eval_at_iter": 30},
    {"train_iters": 100, "eval_interval": 7, "start_eval_at_iter": 300},
    {"train_iters": 99, "eval_global_batch_size": 24, "eval_interval": 33},
    {"train_samples": 1001},
    {"train_iters": 10, "skip_train": True},
    {"train_iters": 10, "full_validation": True},
]


def test_megatron_asks_for_the_samples_that_are_planned(on_ranks: Callable) -> None:
    on_ranks(1, f"{__name__}:compare_with_megatron")


def compare_with_megatron() -> None:
    from megatron.training import global_vars, training

    for asked in ASKED:
        options = {
            "train_iters": None,
            "train_samples": None,
            "global_batch_size": 16,
            "eval_iters": 3,
            "eval_interval": 10,
            "eval_global_batch_size": 16,
            "start_eval_at_iter": None,
            "full_validation": False,
            "skip_train": False,
            "phase_transition_iterations": None,
            "step_batch_size_schedule": None,
            **asked,
        }
        planned = planned_samples(options)
        args = Namespace(**options)
        global_vars.set_args(args)
        training.update_train_iters(args)
        assert planned == training.get_train_valid_test_num_samples(), asked
    assert planned_samples(options | {"phase_transition_iterations": [5]}) is None


@pytest.mark.parametrize("weights", [None, (0.25, 0.75)])
def test_megatron_serves_what_is_stated(tmp_path: Path, weights: tuple | None) -> None:
    prefixes = [make(tmp_path / "a"), make(tmp_path / "b", 1, documents=300)]
    values: list[Any] = list(prefixes)
    if weights:
        values = [part for pair in zip(weights, prefixes, strict=True) for part in pair]
    asked = (200, 8, 4)
    built = build(make_config(tmp_path / "cache", *values), asked)
    summary = check_training_data([*map(str, values)], "80,10,10")
    for split, wanted, blend in zip(("train", "valid", "test"), asked, built, strict=True):
        shares = summary.shares(split)
        served = serve_samples(wanted, shares, SEQUENCE)
        counts = np.bincount(np.asarray(blend.dataset_index), minlength=2)
        assert np.abs(counts - [part.samples for part in served]).max() <= 2
        if weights is None:
            assert [samples_per_epoch(one.tokens, SEQUENCE) for one in shares] == [
                len(dataset) for dataset in blend.datasets
            ]
    # A quarter of 200 samples is all of the small data set and more; three quarters are not.
    if weights:
        small, large = serve_samples(200, summary.shares("train"), SEQUENCE)
        assert small.samples == 50
        assert small.epochs == pytest.approx(50 * SEQUENCE / summary.datasets[0].split_tokens[0])
        assert small.epochs > large.epochs


def test_too_few_tokens_for_a_sample(tmp_path: Path) -> None:
    """Megatron dies of such a data set in a blend, and tiles it into one sample elsewhere."""
    for tokens, samples in ((SEQUENCE, 0), (SEQUENCE + 1, 1)):
        assert samples_per_epoch(tokens, SEQUENCE) == samples
    check_plan(plan(train=[share("a", SEQUENCE + 1)]), (8, 0, 0), SEQUENCE)
    message = r"^data_path \(a\) must hold .* seq_length \+ 1 = 33 tokens, of the train split; it"
    with pytest.raises(ValueError, match=message):
        check_plan(plan(train=[share("a", SEQUENCE)]), (8, 0, 0), SEQUENCE)
    small, large = make(tmp_path / "a", documents=10), make(tmp_path / "b", documents=200)
    assert check_training_data([small], "80,10,10").datasets[0].split_tokens[1] <= SEQUENCE
    with pytest.raises(AssertionError):
        build(make_config(tmp_path / "cache", small, large))


def test_a_blend_without_weights_has_one_epoch(tmp_path: Path) -> None:
    prefixes = [make(tmp_path / name, seed) for seed, name in enumerate("ab")]
    shares = check_training_data(prefixes, "80,10,10").shares("train")
    there = sum(samples_per_epoch(one.tokens, SEQUENCE) for one in shares)
    asked = (there + 1, 2, 2)
    assert len(build(make_config(tmp_path / "cache", *prefixes), asked)[0]) == there
    check_plan(plan(train=shares), (there, 0, 0), SEQUENCE)
    check_plan(plan(train=shares), (there + 1, 0, 0), SEQUENCE, stops_at_end=False)
    with pytest.raises(ValueError, match=rf"takes {there + 1} samples .* one epoch, {there} sam"):
        check_plan(plan(train=shares), (there + 1, 0, 0), SEQUENCE)


def plan(**blends: list[Share]) -> dict[str, list[Share]]:
    return {"train": [share("t", 10_000)], "valid": [], "test": []} | blends


@pytest.mark.parametrize(
    ("blends", "samples", "message"),
    [
        ({"train": []}, (8, 0, 0), r"^train_data_path \(not given\) must be given"),
        ({}, (8, 8, 8), r"^eval_iters must be 0 where the valid split has no data"),
        ({}, (8, None, 0), r"^eval_iters must be 0 where the valid split has no data"),
        ({"valid": [share("v", 900, 1.0)]}, (8, None, 0), r"^full_validation \(True\) must come"),
        ({"valid": [share("v", 900, 1.0)]}, (8, 0, 0), r"^eval_iters must ask for samples of the"),
    ],
)
def test_what_megatron_cannot_do(blends: dict, samples: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_plan(plan(**blends), samples, SEQUENCE)


def test_evaluation_alone_needs_no_training_data() -> None:
    blends = {"train": [], "valid": [share("v", 900)], "test": []}
    lines = check_plan(blends, (0, 8, 8), SEQUENCE, skip_train=True)
    assert lines[0] == "> train: no data"


def test_what_is_printed() -> None:
    lines = check_plan(plan(train=[share("data/c", 32_000)]), (102_400, 0, 0), SEQUENCE)
    assert lines[0] == "> train: 102,400 samples = 102.4 epochs of data/c"
    assert lines[1].startswith("WARNING: training repeats data/c 102.4 times; beyond 4 epochs")
    few = check_plan(plan(train=[share("data/c", 32_000)]), (4000, 0, 0), SEQUENCE)
    assert few == ["> train: 4,000 samples = 4.0 epochs of data/c", *lines[2:]]
    blend = [share(f"d{i}", 3200 * (i + 1), 1.0) for i in range(20)]
    told = describe_samples("train", 2000, serve_samples(2000, blend, SEQUENCE))
    assert told[1] == ">   100 samples = 1.0 epochs of d0"
    assert told[-1] == ">   0.1 epochs or less of each of 12 more"


def test_a_data_set_named_twice_counts_once() -> None:
    twice = [share("a", 3200, 1.0), share("b", 3200, 2.0), share("a", 3200, 1.0)]
    served = serve_samples(200, twice, SEQUENCE)
    assert [(part.prefix, part.samples, part.epochs) for part in served] == [
        ("a", 100, 1.0),
        ("b", 100, 1.0),
    ]
    lines = check_plan(plan(train=twice), (200, 0, 0), SEQUENCE)
    assert lines[-1].startswith("WARNING: data_path (a) is named 2 times")


def test_arithmetic_of_a_long_run() -> None:
    asked = plan_samples(
        train_iters=14305,
        train_samples=None,
        global_batch_size=512,
        eval_iters=100,
        eval_interval=500,
    )
    assert asked == (14305 * 512, 29 * 100 * 512, 100 * 512)
