"""What attention holds until backward: counted exactly, and made again with the same bits."""

import torch

from megatron_satformer.model.attention import Remade


def test_value_residuals_keep_logits_and_v1(on_ranks):
    on_ranks(1, "tests.model.memory:value_residuals_keep_logits_and_v1")


def test_what_is_forgotten_is_made_again():
    x = torch.randn(5, 3, requires_grad=True)
    doubled = x * 2
    remade = Remade(doubled, lambda out: torch.mul(x.detach(), 2, out=out))
    behind = doubled.sin()  # keeps `doubled`
    remade.forget(behind)
    assert doubled.untyped_storage().nbytes() == 0
    behind.sum().backward()
    assert torch.equal(x.grad, (x.detach() * 2).cos() * 2)
    assert doubled.untyped_storage().nbytes() == 60
