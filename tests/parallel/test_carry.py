import pytest
import torch

from megatron_satformer.config import SATFormerConfig
from megatron_satformer.parallel.carry import check_stages, pack, packed_width, unpack

HIDDEN, GROUPS, HEAD_DIM = 24, 2, 6


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


@pytest.mark.parametrize(
    "options",
    [
        {"pipeline_model_parallel_size": 4},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "architecture": "resformer"},
        {"pipeline_model_parallel_size": 4, "architecture": "transformer"},
    ],
    ids=str,
)
def test_stages_that_can_carry_v1(options):
    check_stages(build_config(**options, pipeline_dtype=torch.float32))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {
                "pipeline_model_parallel_size": 4,
                "num_layers": 3,
                "account_for_embedding_in_pipeline_split": True,
            },
            r"\(4\) leaves pipeline rank 0 a stage without layers",
        ),
        (
            {"pipeline_model_parallel_size": 4, "architecture": "resformer"},
            r"\(4\) leaves pipeline rank 0 layers \[1\] of resformer, none of which mixes",
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "architecture": "resformer",
                "value_residual_last_k": 1,
            },
            r"rank 0 layers \[1, 2\] of resformer",
        ),
    ],
    ids=str,
)
def test_stages_that_cannot(options, told):
    with pytest.raises(NotImplementedError, match=told):
        check_stages(build_config(**options, pipeline_dtype=torch.float32))
