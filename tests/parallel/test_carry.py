import pytest
import torch

from megatron_satformer.model.architectures import TABLE, find_architecture
from megatron_satformer.model.architectures.record import Carry
from megatron_satformer.parallel.carry import (
    boundary_width,
    boundary_widths,
    carry_behind,
    check_ranks_hold_something,
    chunk_layers,
    pack,
    unpack,
)
from tests import models

HIDDEN, GROUPS, HEAD_DIM = 24, 2, 6
KV = GROUPS * HEAD_DIM
EMBEDDING_AND_LOSS_COUNT_AS_LAYERS = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
TP2 = {"tensor_model_parallel_size": 2}
SP = TP2 | {"sequence_parallel": True}


def build_config(**options):
    shape = {
        "num_layers": 4,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_query_groups": GROUPS,
        "kv_channels": HEAD_DIM,
    }
    return models.build_config(**shape | options)


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({"architecture": "transformer"}, HIDDEN),
        ({}, HIDDEN + KV),
        ({"architecture": "resformer"}, HIDDEN + KV),
        (TP2, HIDDEN + KV // 2),
        (SP, HIDDEN + KV),
        ({"num_query_groups": 4}, 2 * HIDDEN),  # MHA
    ],
    ids=str,
)
def test_width_is_the_published_formula(options, width):
    config = build_config(**options)
    assert [boundary_width(config, n) for n in (1, 2, 3)] == [width] * 3
    assert [boundary_width(config, n) for n in (0, 4)] == [HIDDEN] * 2


@pytest.mark.parametrize(("options", "kv"), [({}, KV), (TP2, KV // 2), (SP, KV)], ids=str)
def test_every_boundary_has_its_own_width(options, kv):
    """One stream and the values of all layers so far."""
    config = build_config(architecture="meanformer", **options)
    assert [boundary_width(config, n) for n in (1, 2, 3)] == [
        2 * HIDDEN + n * kv for n in (1, 2, 3)
    ]
    assert [boundary_width(config, n) for n in (0, 4)] == [HIDDEN] * 2


@pytest.mark.parametrize("architecture", TABLE)
def test_nothing_is_carried_at_the_ends(architecture):
    config = build_config(architecture=architecture)
    record = find_architecture(architecture)
    assert carry_behind(config, 0) == carry_behind(config, config.num_layers) == Carry()
    assert record.carries(config) == max(carry_behind(config, n) for n in (1, 2, 3))


CARRIES = [Carry(), Carry(heads=1), Carry(streams=2), Carry(streams=1, heads=3)]


@pytest.mark.parametrize("carry", CARRIES, ids=str)
@pytest.mark.parametrize("options", [{}, TP2, SP], ids=str)
def test_unpack_inverts_pack_forward_and_backward(options, carry):
    config = build_config(**options)
    tp = config.tensor_model_parallel_size
    rows = 10 // tp if config.sequence_parallel else 10
    stream, head = (rows, 3, HIDDEN), (10, 3, GROUPS // tp, HEAD_DIM)
    shapes = [stream] * (1 + carry.streams) + [head] * carry.heads
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    packed = pack(tensors[0], tuple(tensors[1:]))
    assert packed.shape[:2] == (rows, 3)
    assert packed.numel() == sum(tensor.numel() for tensor in tensors)
    assert packed._base is None  # deallocate_output_tensor refuses views
    hidden_states, carried = unpack(packed, config, carry)
    for again, tensor in zip((hidden_states, *carried), tensors, strict=True):
        assert torch.equal(again, tensor)
        assert again.is_contiguous()
        # A view: the schedule keeps the received buffer anyway.
        assert again.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
    sum(n * again.sum() for n, again in enumerate((hidden_states, *carried), 1)).backward()
    for n, tensor in enumerate(tensors, 1):
        assert torch.equal(tensor.grad, torch.full_like(tensor, float(n)))


def test_an_fp32_residual_stream_gives_heads_back_in_their_dtype():
    config = build_config(params_dtype=torch.bfloat16)
    v1 = torch.randn(10, 3, GROUPS, HEAD_DIM).bfloat16()
    hidden_states, (again,) = unpack(
        pack(torch.randn(10, 3, HIDDEN), (v1,)), config, Carry(heads=1)
    )
    assert hidden_states.dtype == torch.float32
    assert torch.equal(again, v1)


PP2 = {"pipeline_model_parallel_size": 2}
PP4 = {"pipeline_model_parallel_size": 4}
VIRTUAL = {"virtual_pipeline_model_parallel_size": 2}
H, PACKED = HIDDEN, HIDDEN + KV


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
        (
            PP2 | VIRTUAL | {"pipeline_model_parallel_layout": "E|ttt|t|L"},
            [0, 3, 1, 0],
            [H, PACKED, H],
        ),
        (
            PP4 | {"num_layers": 6} | dict.fromkeys(EMBEDDING_AND_LOSS_COUNT_AS_LAYERS, True),
            [1, 2, 2, 1],
            [PACKED] * 3,
        ),
        (PP4 | {"architecture": "transformer"}, [1, 1, 1, 1], [H] * 3),
        (
            PP4 | {"architecture": "meanformer", "num_layers": 8},
            [2, 2, 2, 2],
            [2 * H + n * KV for n in (2, 4, 6)],
        ),
    ],
    ids=str,
)
def test_what_crosses_which_boundary(options, layers, widths):
    config = build_config(**options, pipeline_dtype=torch.float32)
    chunks = chunk_layers(config)
    assert [len(chunk) for chunk in chunks] == layers
    assert [number for chunk in chunks for number in chunk] == [*range(1, config.num_layers + 1)]
    assert boundary_widths(config) == widths


def test_a_rank_that_holds_nothing_is_refused():
    layout = {"pipeline_model_parallel_layout": "Et||ttt|L"}
    check_ranks_hold_something(build_config(**PP2 | VIRTUAL | layout, pipeline_dtype=torch.float32))
    with pytest.raises(
        ValueError, match=r"\(Et\|\|ttt\|L\) must give .*; rank 1 of .* \(4\) holds"
    ):
        check_ranks_hold_something(build_config(**PP4 | layout, pipeline_dtype=torch.float32))
