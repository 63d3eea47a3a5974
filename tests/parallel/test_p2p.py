import pytest

from megatron_satformer.model.architectures import TABLE
from tests.parallel.layouts import some_fast

H, KV = 24, 12


@pytest.mark.parametrize("architecture", some_fast(TABLE))
def test_receive_buffers_are_as_wide_as_what_is_sent(on_ranks, architecture):
    on_ranks(2, "tests.parallel.ranks:sends_and_receives", {"architecture": architecture})


def test_samples_that_were_made_one_are_received_as_one(on_ranks):
    """Packed documents under Transformer Engine: [s b, 1, w], where the schedule says [s, b, h]."""
    on_ranks(2, "tests.parallel.ranks:sends_and_receives", {"architecture": "meanformer"}, True)


@pytest.mark.parametrize(
    ("microbatches", "groups"), [(2, [2]), (4, [2, 2]), (8, [3, 3, 2])], ids=str
)
def test_widths_follow_the_schedule(on_ranks, microbatches, groups):
    """Two ranks of two chunks, one layer each: boundaries behind layers 1, 2 and 3."""
    one, two, three = (2 * H + n * KV for n in (1, 2, 3))
    options = {
        "architecture": "meanformer",
        "virtual_pipeline_model_parallel_size": 2,
        "microbatch_group_size_per_vp_stage": groups[0],
    }
    # Rank 0 runs layers 1 and 3, rank 1 layers 2 and 4; a chunk serves a group at a time.
    before = [
        [two for group in groups for _ in range(group)],
        [width for group in groups for width in [one] * group + [three] * group],
    ]
    behind = [
        [width for group in groups for width in [three] * group + [one] * group],
        [two for group in groups for _ in range(group)],
    ]
    call = "tests.parallel.ranks:widths_in_order"
    on_ranks(2, call, options, microbatches, before, behind)
