"""Missing, misshapen and unknown tensors are all named at once."""

import pytest

from megatron_satformer.checkpoint.tensor_names import LISTED, check_tensor_names

MODEL = {"a.weight": (4, 2), "b.weight": (3,), "scale": ()}


def test_the_same_names_and_shapes_fit():
    check_tensor_names({name: [*shape] for name, shape in reversed(MODEL.items())}, MODEL, "no")


def test_every_difference_is_named():
    stored = {"z": (1,), "a.weight": (2, 4), "scale": (), "c": ()}
    with pytest.raises(ValueError, match="does not fit") as error:
        check_tensor_names(stored, MODEL, "It does not fit")
    assert str(error.value) == (
        "It does not fit: a.weight is (2, 4), not (4, 2); b.weight is missing; c is not known; "
        "z is not known."
    )


@pytest.mark.parametrize(("spare", "end"), [(0, "is missing."), (2, "; and 2 more.")])
def test_the_list_ends(spare, end):
    expected = {f"layer {n}": (1,) for n in range(LISTED + spare)}
    with pytest.raises(ValueError, match="missing") as error:
        check_tensor_names({}, expected, "It does not fit")
    assert str(error.value).count("missing") == LISTED
    assert str(error.value).endswith(end)
