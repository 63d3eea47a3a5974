from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_satformer.data.training.blend_report import (
    SplitReport,
    draw_documents,
    render_blend,
    report_blend,
    wanted_samples,
)
from tests.datasets import write_dataset

SEQUENCE = 8


def make(prefix: Path, documents: int, first: int) -> str:
    """Data sets of unequal documents; every token says which one it comes from."""
    lengths = np.random.default_rng(first).integers(1, 30, size=documents)
    return write_dataset(prefix, np.full(lengths.sum(), first), lengths, 1000)


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("blend")
    return [make(folder / name, n, n) for name, n in (("a", 60), ("b", 200), ("c", 90))]


def build(blend: tuple[list[str], list[float] | None], wanted: Any, cache: Path) -> list[Any]:
    """The data sets that training builds."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQUENCE,
        blend=blend,
        split="80,15,5",
        path_to_cache=str(cache),
        tokenizer=NullTokenizer(1000),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, wanted, lambda: True, config).build()


def check_split(report: SplitReport, built: Any) -> None:
    """Compares with what a BlendedDataset draws for the samples that training takes."""
    assert report.wanted is not None
    assert len(built) >= report.wanted
    drawn = np.bincount(built.dataset_index[: report.wanted], minlength=len(report.servings))
    for serving, count, dataset in zip(report.servings, drawn, built.datasets, strict=True):
        assert abs(serving.samples - count) <= 1
        tokens = int(dataset.dataset.sequence_lengths[dataset.indices].sum())
        assert (serving.documents, serving.tokens) == (len(dataset.indices), tokens)
        # How often Megatron repeats the documents: our epochs, rounded up, and half a percent more.
        repeats, rest = divmod(len(dataset.document_index), len(dataset.indices))
        assert rest == 0
        one_sample = SEQUENCE / tokens
        assert serving.epochs == pytest.approx(count * one_sample, abs=1.001 * one_sample)
        most = 1.005 * serving.epochs + 3 * one_sample
        assert np.ceil(serving.epochs - 2 * one_sample) <= repeats <= np.ceil(most)


def test_a_weighted_blend_is_megatrons(prefixes: list[str], tmp_path: Path) -> None:
    wanted = wanted_samples(300, None, 4, 3, 100)
    assert wanted == (1200, 4 * 3 * 4, 12)
    weights = [2.0, 5.0, 0.5]
    data_path = [word for pair in zip(map(str, weights), prefixes, strict=True) for word in pair]
    reports = report_blend(data_path, "80,15,5", SEQUENCE, wanted)
    built = build((prefixes, weights), wanted, tmp_path)
    assert [report.split for report in reports] == ["train", "valid", "test"]
    for report, dataset in zip(reports, built, strict=True):
        check_split(report, dataset)
    assert [serving.part for serving in reports[0].servings] == pytest.approx(
        [4 / 15, 2 / 3, 1 / 15]
    )


def test_a_blend_without_weights_is_megatrons(prefixes: list[str], tmp_path: Path) -> None:
    (report, *_) = report_blend(prefixes, "80,15,5", SEQUENCE, (100, None, None))
    built = build((prefixes, None), (100, 10, 5), tmp_path)
    check_split(report, built[0])
    whole = report_blend(prefixes, "80,15,5", SEQUENCE, (None, None, None))
    assert [serving.samples for serving in whole[0].servings] == [
        len(dataset) for dataset in built[0].datasets
    ]
    with pytest.raises(ValueError, match="weights"):
        report_blend(prefixes, "80,15,5", SEQUENCE, (100_000, None, None))
    with pytest.raises(ValueError, match="must hold at least one sample"):
        report_blend(["1", prefixes[0]], "80,15,5", 100_000, (None, None, None))


def test_one_data_set_is_megatrons(prefixes: list[str], tmp_path: Path) -> None:
    (report,) = report_blend(prefixes[:1], "100,0,0", SEQUENCE, (500, None, None))
    (train, *_) = build((prefixes[:1], None), (500, 1, 1), tmp_path)
    (whole,) = report.servings
    assert (whole.samples, whole.part) == (500, 1.0)
    tokens = int(train.dataset.sequence_lengths.sum())
    assert whole.epochs == pytest.approx(500 * SEQUENCE / tokens)


def test_documents_are_drawn_by_weight_from_the_split(prefixes: list[str]) -> None:
    data_path = ["3", prefixes[0], "1", prefixes[2]]
    reports = report_blend(data_path, "80,15,5", SEQUENCE, (400, None, None))
    drawn = draw_documents(reports[0], "80,15,5", 400, seed=1)
    assert {int(token) for one in drawn for token in one.tokens} == {60, 90}
    firsts = [one for one in drawn if one.prefix == prefixes[0]]
    assert 260 <= len(firsts) <= 340
    assert {one.sequence for one in firsts} == set(range(48))
    again = draw_documents(reports[0], "80,15,5", 400, seed=1)
    assert [one.sequence for one in again] == [one.sequence for one in drawn]
    text = render_blend(reports)
    assert "train: 400 samples of 400 wanted" in text
    assert " 75.000% " in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((5, 7, 1, None, None), r"train_iters \(5\) must not be combined with train_samples \(7\)"),
        ((5, None, None, None, None), r"train_iters \(5\) must come with global_batch_size"),
        ((None, None, 4, None, None), r"global_batch_size \(4\) must come with train_iters or"),
        ((None, 9, None, 3, None), r"eval_iters \(3\) must come with global_batch_size"),
        ((0, None, 4, None, None), r"train_iters \(0\) must be at least 1"),
        ((1, None, 4, -1, None), r"eval_iters \(-1\) must not be negative"),
    ],
)
def test_options_that_do_not_fit(given: tuple[int | None, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wanted_samples(*given)


def test_the_tool(prefixes: list[str], tool: Callable, fails: Callable[..., str]) -> None:
    flags = ("--data-path", *prefixes[:1], "--seq-length", 8, "--split", "1")
    result = tool("sample_blend", *flags, "--train-samples", 50, "--show", 2)
    assert result.returncode == 0, result
    assert result.stdout.startswith("train: 50 samples of 50 wanted")
    assert result.stdout.count("60 60") >= 2
    assert "must be in [0, 5)" in fails(
        "sample_blend", *flags, "--show", 1, "--tokenizer-type", "NullTokenizer", "--vocab-size", 5
    )
    assert "seed (3) must come with show" in fails("sample_blend", *flags, "--seed", 3)
    assert "tokenizer_type (given) must come with show" in fails(
        "sample_blend", *flags, "--tokenizer-type", "NullTokenizer", "--vocab-size", 5
    )
