"""LIMe's routers: where they start, how many numbers they have, and what is refused."""

from argparse import Namespace

import pytest
import torch

from megatron_satformer.model.architectures.lime import LIME, identity_router, starting_router
from tests.models import build_config

SHAPE = {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 4}


def test_routers_read_the_own_layer_and_random_sums_of_earlier_ones():
    """Their variance is 1 over the number of heads that are read, the own layer's among them."""
    torch.manual_seed(0)
    n, ng = 5, 32
    router = starting_router(build_config("lime", **SHAPE), (ng, n, ng))
    assert torch.equal(router[:, -1], torch.eye(ng))
    earlier = router[:, :-1]
    bound = (3 / (n * ng)) ** 0.5
    assert 0.99 * bound < earlier.abs().max() <= bound
    assert earlier.var().item() == pytest.approx(1 / (n * ng), rel=0.05)
    assert abs(earlier.mean().item()) < 0.05 * bound


def test_routers_can_start_as_a_transformer():
    config = build_config("lime", **SHAPE, lime_router_init="identity")
    router = starting_router(config, (4, 3, 4))
    assert torch.equal(router, identity_router((4, 3, 4)))
    assert torch.equal(router.sum(1), torch.eye(4))
    assert torch.equal(router[:, -1], torch.eye(4))


def test_random_routers_over_a_transformers_weights_are_told():
    told = build_config("lime", **SHAPE, from_transformer=True).warning
    assert "lime_router_init (uniform) with from_transformer (True)" in told
    same = build_config("lime", **SHAPE, from_transformer=True, lime_router_init="identity")
    assert same.warning is None
    assert build_config("lime", **SHAPE).warning is None


@pytest.mark.parametrize("groups", [4, 2])
def test_parameters(groups):
    """ng^2 n of every layer n but the first."""
    config = build_config("lime", **SHAPE, num_query_groups=groups)
    assert LIME.count_parameters(config) == groups**2 * (2 + 3 + 4)


def test_routers_learn_at_their_own_rate_and_are_not_decayed():
    args = Namespace(lr=2e-3, min_lr=2e-4, lime_router_lr_mult=10.0)
    (pattern,) = LIME.parameter_groups(args)
    assert pattern == "*.lime_router"
    group = LIME.parameter_groups(args)[pattern]
    assert group == {"wd_mult": 0.0, "max_lr": pytest.approx(2e-2), "min_lr": pytest.approx(2e-3)}
    without = Namespace(lr=None, min_lr=None, lime_router_lr_mult=10.0)
    assert LIME.parameter_groups(without) == {pattern: {"wd_mult": 0.0}}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_layers": 1}, r"num_layers \(1\) must be at least 2 for architecture \(lime\)"),
        ({"lime_router_lr_mult": 0.0}, r"lime_router_lr_mult \(0.0\) must be more than 0"),
        ({"lime_router_lr_mult": float("nan")}, r"lime_router_lr_mult \(nan\) must be more than 0"),
        (
            {"num_query_groups": 2, "tensor_model_parallel_size": 4},
            r"num_query_groups \(2\) must be a multiple of tensor_model_parallel_size \(4\): keys "
            r"and values are sharded by KV head. Use TP 1 or 2",
        ),
    ],
    ids=str,
)
def test_what_it_cannot_have_is_told(options, told):
    with pytest.raises(ValueError, match=told):
        build_config("lime", **SHAPE | options)


@pytest.mark.parametrize(("groups", "more"), [(6, 2), (2, -1)])
def test_memory_grows_evenly_with_depth(on_ranks, groups, more):
    """By K and V of every layer, 2 kv.

    With fewer groups by less than a Transformer, which keeps its whole QKV buffer, 5 kv here, for
    the norm of K and the values: instead of it K, V, K' and V'.
    """
    options = {"num_query_groups": groups}
    on_ranks(1, "tests.model.memory:grows_by", "lime", options, more)
