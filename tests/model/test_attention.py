"""What attention holds until backward: counted exactly, and made again with the same bits."""

import torch

from megatron_satformer.model.attention import Fused, Remade


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


def test_one_split_is_megatrons_two():
    """q, k, v of two groups and one row more, padded: the same views, the same gradients."""
    rows = torch.randn(3, 2, 2 * 9 + 1 + 3, requires_grad=True)
    kept = []
    fused = Fused(rows * 1, [18, 1, 3], kept.append).view(3, 2, 2, 9)
    assert Fused(rows, [18, 1, 3], kept.append).size() == (3, 2, 18)
    parts = torch.split(fused, [3, 3, 3], dim=3)
    qkv, other, _ = (rows * 1).split([18, 1, 3], dim=-1)
    wanted = [*qkv.view(3, 2, 2, 9).split(3, dim=3), other]
    for got, twin in zip([*parts, *kept], wanted, strict=True):
        assert torch.equal(got, twin)
    for read in (slice(0, 4), slice(1, 3)):  # all of it, and some
        of = [
            torch.autograd.grad(sum(x.sin().sum() for x in some[read]), rows, retain_graph=True)
            for some in ([*parts, *kept], wanted)
        ]
        assert torch.equal(of[0][0], of[1][0])
