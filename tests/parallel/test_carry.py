import pytest
import torch

from megatron_satformer.config import SATFormerConfig
from megatron_satformer.parallel.carry import (
    boundary_width,
    check_ranks_hold_something,
    chunk_layers,
    pack,
    packed_width,
    unpack,
)

HIDDEN, GROUPS, HEAD_DIM = 24, 2, 6
EMBEDDING_AND_LOSS_COUNT_AS_LAYERS = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


def build_config(**options):
    shape = {
        "num_layers": 4,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_query_groups": GROUPS,
        "kv_channels": HEAD_DIM,
    }
    return SATFormerConfig(**shape | options)


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({"architecture": "transformer"}, HIDDEN),
        ({}, HIDDEN + 12),
        ({"architecture": "resformer"}, HIDDEN + 12),
        ({"tensor_model_parallel_size": 2}, HIDDEN + 6),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, HIDDEN + 12),
        ({"num_query_groups": 4}, 2 * HIDDEN),  # MHA
    ],
    ids=str,
)
def test_width_is_the_published_formula(options, width):
    assert packed_width(build_config(**options)) == width


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_unpack_inverts_pack_forward_and_backward(tp, sequence_parallel):
    config = build_config(tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel)
    rows = 10 // tp if sequence_parallel else 10
    hidden = torch.randn(rows, 3, HIDDEN, requires_grad=True)
    v1 = torch.randn(10, 3, GROUPS // tp, HEAD_DIM, requires_grad=True)
    packed = pack(hidden, v1)
    assert packed.shape == (rows, 3, packed_width(config))
    again_hidden, again_v1 = unpack(packed, config)
    assert torch.equal(again_hidden, hidden)
    assert torch.equal(again_v1, v1)
    for piece in (again_hidden, again_v1):
        assert piece.is_contiguous()
        assert piece.untyped_storage().nbytes() == piece.nbytes  # no hold on the packed buffer
    (again_hidden.sum() + (3 * again_v1).sum()).backward()
    assert torch.equal(hidden.grad, torch.ones_like(hidden))
    assert torch.equal(v1.grad, torch.full_like(v1, 3.0))


@pytest.mark.parametrize("architecture", ["transformer", "satformer"])
def test_receive_buffers_are_as_wide_as_what_is_sent(on_ranks, architecture):
    on_ranks(2, "tests.parallel.ranks:sends_and_receives", {"architecture": architecture})


PP2 = {"pipeline_model_parallel_size": 2}
PP4 = {"pipeline_model_parallel_size": 4}
VIRTUAL = {"virtual_pipeline_model_parallel_size": 2}
H, PACKED = HIDDEN, HIDDEN + GROUPS * HEAD_DIM


@pytest.mark.parametrize(
    ("options", "layers", "widths"),
    [
        ({}, [4], []),
        (PP2, [2, 2], [PACKED]),
        (PP4, [1, 1, 1, 1], [PACKED] * 3),
        (PP2 | VIRTUAL, [1, 1, 1, 1], [PACKED] * 3),
        (PP2 | {"num_layers_in_first_pipeline_stage": 3}, [3, 1], [PACKED]),
        (PP4 | {"pipeline_model_parallel_layout": "E|ttt|t|L"}, [0, 3, 1, 0], [H, PACKED, H]),
        (PP4 | {"pipeline_model_parallel_layout": "Et||ttt|L"}, [1, 0, 3, 0], [PACKED, PACKED, H]),
        # The interleaved schedule receives every tensor in one shape.
        (
            PP2 | VIRTUAL | {"pipeline_model_parallel_layout": "E|ttt|t|L"},
            [0, 3, 1, 0],
            [PACKED] * 3,
        ),
        (
            PP4 | {"num_layers": 6} | dict.fromkeys(EMBEDDING_AND_LOSS_COUNT_AS_LAYERS, True),
            [1, 2, 2, 1],
            [PACKED] * 3,
        ),
        (PP4 | {"architecture": "transformer"}, [1, 1, 1, 1], [H] * 3),
    ],
    ids=str,
)
def test_v1_crosses_the_boundaries_behind_layer_1(options, layers, widths):
    config = build_config(**options, pipeline_dtype=torch.float32)
    chunks = chunk_layers(config)
    assert [len(chunk) for chunk in chunks] == layers
    assert [number for chunk in chunks for number in chunk] == [*range(1, config.num_layers + 1)]
    behind = [chunk.stop - 1 for chunk in chunks[:-1]]
    assert [boundary_width(config, layers) for layers in behind] == widths


def test_a_rank_that_holds_nothing_is_refused():
    layout = {"pipeline_model_parallel_layout": "Et||ttt|L"}
    check_ranks_hold_something(build_config(**PP2 | VIRTUAL | layout, pipeline_dtype=torch.float32))
    with pytest.raises(
        ValueError, match=r"\(Et\|\|ttt\|L\) must give .*; rank 1 of .* \(4\) holds"
    ):
        check_ranks_hold_something(build_config(**PP4 | layout, pipeline_dtype=torch.float32))
