import pytest
import torch

from megatron_satformer.model.architectures import TABLE, find_architecture
from megatron_satformer.parallel import recompute
from megatron_satformer.parallel.recompute import checkpoint_nested
from tests.models import build_config

SHAPE = {"num_layers": 4, "hidden_size": 36, "num_attention_heads": 6}
FULL = {"recompute_granularity": "full"}


@pytest.mark.parametrize("architecture", TABLE)
@pytest.mark.parametrize(
    "options",
    [
        {"recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_method": "uniform", "recompute_num_layers": 3},
        {"recompute_method": "block", "recompute_num_layers": 2},
    ],
    ids=str,
)
def test_full_recompute_equals_plain(on_ranks, architecture, options):
    """Bit by bit, but where gradients of several layers meet: they add up in another order."""
    model = {"architecture": architecture}
    record = find_architecture(architecture)
    carried = sum(record.carries(build_config(architecture, **SHAPE)))
    rtol = 0.0 if carried <= 1 and record.finish is None else 2e-6
    on_ranks(1, "tests.model.ranks:recompute_equals_plain", FULL | options, model, rtol)


@pytest.fixture
def plain_checkpoint(monkeypatch):
    """torch's own in the place of Megatron's, which wants an RNG tracker."""

    def checkpoint(function, distribute, *args):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True)

    stand_in = type("stand_in", (), {"checkpoint": staticmethod(checkpoint)})
    monkeypatch.setattr(recompute, "tensor_parallel", stand_in)


def test_tuples_go_in_and_come_out(plain_checkpoint):
    """What is new goes through the checkpoint, what is handed on goes past it."""
    x, old = (torch.randn(3, requires_grad=True) for _ in range(2))
    seen = []

    def layer(x, mask, carried):
        (old,) = carried
        seen.append(torch.is_grad_enabled())
        new = x * old
        return x + new.sum(), (old, new), None

    y, (again, new), nothing = checkpoint_nested(layer, False, x, None, (old,))
    assert nothing is None
    assert again is old
    (y.sum() + 2 * new.sum() + 3 * again.sum()).backward()
    assert seen == [False, True]
    expected_x = 1 + (3 + 2) * old.detach()
    expected_old = (3 + 2) * x.detach() + 3
    torch.testing.assert_close(x.grad, expected_x)
    torch.testing.assert_close(old.grad, expected_old)


def test_no_carry_is_none(plain_checkpoint):
    x = torch.randn(3, requires_grad=True)
    y, context = checkpoint_nested(lambda x, context: (2 * x, context), False, x, None)
    y.sum().backward()
    assert context is None
    assert torch.equal(x.grad, torch.full((3,), 2.0))
