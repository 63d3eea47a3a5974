"""Which outputs a sum of DenseFormer reads, and which cross a boundary."""

from types import SimpleNamespace

import pytest

from megatron_satformer.model.architectures.denseformer import DENSEFORMER, kept, sources
from tests.models import build_config


def options(layers, dilation=1, period=1):
    return SimpleNamespace(num_layers=layers, dwa_dilation=dilation, dwa_period=period)


@pytest.mark.parametrize(
    ("layers", "dilation", "period", "cuts", "widths"),
    [
        (24, 1, 1, (6, 12, 18), (7, 13, 19)),
        (24, 4, 1, (6, 12, 18), (7, 13, 19)),
        (24, 4, 5, (6, 12, 18), (5, 7, 6)),
        (24, 4, 4, (6, 12, 18), (3, 4, 6)),
        (48, 4, 5, (12, 24, 36), (13, 25, 19)),
    ],
)
def test_widths_of_four_stages(layers, dilation, period, cuts, widths):
    """In units of h, X_n included: outputs are dropped behind their last reader."""
    given = options(layers, dilation, period)
    assert tuple(1 + DENSEFORMER.carry(given, n).streams for n in cuts) == widths


def test_sums_read_every_few_outputs_and_their_own():
    given = options(12, 4, 5)
    assert [n for n in range(13) if sources(given, n)] == [5, 10]
    assert list(sources(given, 5)) == [1, 5]
    assert list(sources(given, 10)) == [2, 6, 10]
    assert kept(given, 5) == [1, 2]
    assert kept(given, 10) == [2, 6]
    assert kept(given, 11) == []


@pytest.mark.parametrize("layers", [2, 11, 24])
def test_parameters_of_the_plain_form(layers):
    """L (L + 3) / 2, as published."""
    assert DENSEFORMER.count_parameters(options(layers)) == layers * (layers + 3) // 2


@pytest.mark.parametrize("option", ["dwa_dilation", "dwa_period"])
@pytest.mark.parametrize("value", [0, 5])
def test_distances_are_checked(option, value):
    shape = {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 4}
    with pytest.raises(ValueError, match=rf"{option} \({value}\) must be at least 1 and at most"):
        build_config("denseformer", **shape, **{option: value})
