import numpy as np
import pytest

from megatron_satformer.data.training.blend import (
    documents_needed,
    parse_blend,
    parse_split,
    split_documents,
)

SPLITS = ["969, 30, 1", "98,1,1", "100", "90,10", "80,10,10", "1,1,1", "0,0,1", "99.5,.25,0.25"]
SPLITS += [
    "949,50,1",
    "1,0,3",
    "0.7,0.2,0.1",
    " 8 , 1 , 1 ",
    "5,0,0",
    "33.3,33.3,33.4",
    "98 1 1",
    "9/1",
]


@pytest.mark.parametrize("split", SPLITS)
def test_split_arithmetic_is_megatrons(split: str) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    expected = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    shares = parse_split(split)
    assert shares == expected
    for documents in (1, 2, 3, 5, 10, 49, 50, 51, 1000, 123_457):
        # As in BlendedMegatronDatasetBuilder._build_megatron_dataset_splits.
        ranges = [
            share and tuple(int(round(end * float(documents))) for end in share)  # noqa: RUF046
            for share in expected
        ]
        assert split_documents(shares, documents) == ranges


@pytest.mark.parametrize("split", SPLITS)
def test_documents_needed_is_the_smallest_safe_number(split: str) -> None:
    shares = parse_split(split)

    def filled(count: int) -> bool:
        ranges = split_documents(shares, count)
        return all(r is None or r[1] > r[0] for r in ranges)

    needed = documents_needed(shares)
    assert not filled(needed - 1)
    assert all(filled(count) for count in range(needed, 3 * needed + 100))


def test_documents_needed_for_a_tiny_share_is_near() -> None:
    share = 1e-9
    assert documents_needed([(0.0, 1 - share), (1 - share, 1.0)]) == pytest.approx(1e9, rel=0.01)


@pytest.mark.parametrize(
    "split", ["", "0,0,0", "1,2,3,4", "90,-5,5", "a,b", "1e3,1", "nan", "inf", ","]
)
def test_bad_splits(split: str) -> None:
    with pytest.raises(ValueError, match=r"^split \(.*\) must be up to three numbers") as error:
        parse_split(split)
    assert f"split ({split})" in str(error.value)


@pytest.mark.parametrize(
    "values",
    [["a"], ["a", "b"], ["0.3", "a", "0.7", "b"], ["1", " a "], ["a", "b", "c"], ["1", "2", "3"]],
)
def test_blend_is_megatrons(values: list[str]) -> None:
    from megatron.core.datasets.utils import get_blend_from_list

    expected = get_blend_from_list(values)
    assert expected is not None
    assert parse_blend("data_path", values) == expected[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["0.5", "a", "b", "c"], r"data_path \(0.5 a b c\) must be prefixes alone, or a weight"),
        (["-1", "a"], "must have weights that are not negative"),
        (["nan", "a", "1", "b"], "must have weights that are not negative"),
        (["0", "a", "0", "b"], "not all 0"),
        (["a", "", "b"], r"data_path \(''\) must not be empty"),
        (["a.bin"], r"data_path \(a.bin\) must be the prefix alone. Use a\."),
    ],
)
def test_bad_blends(values: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_blend("data_path", values)


def test_rounding_is_to_even_as_in_megatron() -> None:
    # 2.5 -> 2 and 1.5 -> 2: halves go to the even number, in numpy as in Python.
    assert split_documents([(0.0, 0.5)], 5) == [(0, 2)]
    assert split_documents([(0.0, 0.5)], 3) == [(0, 2)]
    assert np.round([2.5, 1.5]).tolist() == [2, 2]
