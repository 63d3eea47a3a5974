"""Experts in place of the MLP: the value residual around them is that of the dense model."""

import pytest
import torch

from megatron_satformer.model.architectures import TABLE
from tests.model.ranks import build, close, mean_loss, nothing_left, start

EXPERTS = {
    "num_moe_experts": 2,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 44,
    "moe_layer_freq": [0, 1, 1, 1],
}


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
@pytest.mark.parametrize("architecture", TABLE)
def test_experts_alike_are_the_dense_model(on_ranks, architecture, dispatcher):
    on_ranks(1, "tests.model.test_moe:experts_alike", architecture, dispatcher)


def experts_alike(architecture, dispatcher):
    """On ranks: two equal experts, both chosen, their weights 1 in sum, are one MLP.

    In float64, as `equals_reference`.
    """
    start()
    dense = build({"architecture": architecture}).double()
    options = EXPERTS | {"moe_token_dispatcher_type": dispatcher, "architecture": architecture}
    moe = build(options).double()
    wanted = dict(dense.named_parameters())
    same = {
        name: name.replace("experts.local_experts.0.", "").replace("experts.local_experts.1.", "")
        for name, _ in moe.named_parameters()
        if ".mlp.router." not in name
    }
    assert set(same.values()) == set(wanted)
    parameters = dict(moe.named_parameters())
    with torch.no_grad():
        for name, in_dense in same.items():
            parameters[name].copy_(wanted[in_dense])
    losses = mean_loss(moe), mean_loss(dense)
    for loss in losses:
        loss.backward()
    close("loss", *losses)
    for in_dense, parameter in wanted.items():
        gradients = [parameters[n].grad for n, twin in same.items() if twin == in_dense]
        close(in_dense, sum(gradients), parameter.grad)
    nothing_left(moe)


@pytest.mark.parametrize("modules", [["moe"], ["shared_experts", "core_attn", "mlp"]], ids=str)
def test_selective_recompute_is_bit_equal(on_ranks, modules):
    selective = {"recompute_granularity": "selective", "recompute_modules": modules}
    shared = EXPERTS | {"moe_shared_expert_intermediate_size": 20}
    on_ranks(1, "tests.model.ranks:recompute_equals_plain", selective, shared)
