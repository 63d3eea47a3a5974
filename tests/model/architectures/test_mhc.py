"""Streams mixed by doubly stochastic matrices: the equation, the twin, a plain Transformer."""

import pytest
import torch

from megatron_satformer.model.architectures.mhc import MHC, own_tensors, sinkhorn
from megatron_satformer.model.reference.mhc import Connection, Head, MHCTwinConfig
from tests.models import build_config

NAME = MHC.name
RANKS = "tests.model.ranks"
SHAPE = {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 4}
WIDE = {"architecture": NAME, "hidden_size": 2400}
TWIN = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
FORMS = [
    {"hc_streams": 3, "mhc_residual": "plain", "mhc_collapse": "sum"},
    {"hc_streams": 2, "mhc_collapse": "head", "mhc_sinkhorn_iterations": 3},
    {"hc_streams": 1},
]


@pytest.mark.parametrize("residual", ["plain", "transposed"])
@torch.no_grad()
def test_equation_written_out(residual):
    """Sums over streams one by one, for one token; no entry so small that the epsilon shows."""
    config = MHCTwinConfig(**TWIN, hc_streams=3, mhc_residual=residual)
    connection = Connection(config).double()
    torch.manual_seed(0)
    for parameter in connection.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    streams, seen = torch.randn(3, 24, dtype=torch.float64), []
    got = connection(streams[None, None], lambda read: seen.append(read) or read.sin())[0, 0]

    normed = streams.flatten() / (streams.square().mean() + 1e-6).sqrt()
    logits = connection.mapping_proj.weight @ normed
    alphas = [connection.alpha_pre, connection.alpha_post, connection.alpha_res]
    scaled = [a * x for a, x in zip(alphas, logits.split([3, 3, 9]), strict=True)]
    p, q, r = (x + b for x, b in zip(scaled, connection.bias.split([3, 3, 9]), strict=True))
    matrix = r.view(3, 3).exp()
    for _ in range(20):
        matrix = matrix / matrix.sum(1, keepdim=True)
        matrix = matrix / matrix.sum(0, keepdim=True)
    read = sum(p[j].sigmoid() * streams[j] for j in range(3))
    torch.testing.assert_close(seen[0][0, 0], read)
    for i in range(3):
        row = matrix[i] if residual == "plain" else matrix[:, i]
        kept = sum(row[j] * streams[j] for j in range(3))
        torch.testing.assert_close(
            got[i], 2 * q[i].sigmoid() * read.sin() + kept, atol=1e-4, rtol=0
        )


@torch.no_grad()
def test_the_head_written_out():
    head = Head(MHCTwinConfig(**TWIN, hc_streams=2)).double()
    torch.manual_seed(0)
    for parameter in head.parameters():
        parameter.copy_(torch.randn_like(parameter))
    streams = torch.randn(2, 24, dtype=torch.float64)
    logits = head.fn @ (streams.flatten() / (streams.square().mean() + 1e-6).sqrt())
    weights = (head.scale * logits + head.base).sigmoid()
    expected = weights[0] * streams[0] + weights[1] * streams[1]
    torch.testing.assert_close(head(streams[None, None])[0, 0], expected)


@pytest.mark.parametrize("size", [1.0, 300.0])
def test_matrices_are_doubly_stochastic(size):
    """Columns to what the epsilon leaves, rows as far as 20 rounds come; no NaN far out."""
    logits = size * torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    matrix = sinkhorn(logits, 20)
    assert matrix.shape == logits.shape
    torch.testing.assert_close(matrix.sum(-2), torch.ones(5, 2, 4), atol=1e-5, rtol=0)
    if size == 1.0:
        torch.testing.assert_close(matrix.sum(-1), torch.ones(5, 2, 4), atol=1e-4, rtol=0)
    assert matrix.min() >= 0


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_equals_the_twin(on_ranks, form):
    """In float64, gradients included; the default form is in the table's tests."""
    on_ranks(1, f"{RANKS}:equals_reference", {"architecture": NAME, "add_qkv_bias": True, **form})


@pytest.mark.parametrize("collapse", ["mean", "sum", "head"])
def test_starts_as_the_transformer(on_ranks, collapse):
    """Where it is asked to: streams that differ, and their mean is a Transformer's residual."""
    given = {"architecture": NAME, "mhc_start": "transformer", "mhc_collapse": collapse}
    on_ranks(1, f"{RANKS}:starts_as_a_transformer", given | {"add_bias_linear": True})


def test_streams_that_start_alike_are_told_apart():
    """Else all of them would have one gradient, and stay one stream."""
    config = build_config(NAME, **SHAPE, mhc_start="transformer")
    bias = {t.megatron: t.start(t.shape) for t in own_tensors(config, 1)}[
        "mlp_hyper_connection.bias"
    ]
    written = 2 * bias[4:8].sigmoid()
    torch.testing.assert_close(written, torch.tensor([0.625, 0.875, 1.125, 1.375]))
    drawn = {t.megatron: t.start(t.shape) for t in own_tensors(build_config(NAME, **SHAPE), 1)}
    names = [f"{name}_hyper_connection.mapping_proj.weight" for name in ("self_attention", "mlp")]
    one, other = (drawn[name] for name in names)
    assert not torch.equal(one, other)
    assert one.abs().max().item() == pytest.approx((6 / (24 + 96)) ** 0.5, rel=0.01)


def test_what_is_held_for_backward(on_ranks):
    """As Hyper-Connections; Sinkhorn's rounds run again, so that none of them is held."""
    on_ranks(1, f"{RANKS}:holds_for_backward", WIDE, 2 * (4 + 1) + 0.3)


def test_it_holds_at_most_half_as_much_again(on_ranks):
    """Of what a Transformer holds whose MLP is four times as wide."""
    shape = {"hidden_size": 600, "ffn_hidden_size": 2400}
    given = {"architecture": NAME, "num_query_groups": 6, "kv_channels": 100, **shape}
    on_ranks(1, f"{RANKS}:holds_for_backward", given, 12, 1.5)


@pytest.mark.parametrize(
    ("layers", "width", "counts"),
    [(11, 768, (1_622_610, 1_634_903)), (24, 2048, (9_438_480, 9_471_253))],
)
def test_parameters(layers, width, counts):
    """As published, and those of a head beside; the projections alone are decayed."""
    found = []
    for collapse in ("mean", "head"):
        shape = {"num_layers": layers, "hidden_size": width, "num_attention_heads": 4}
        config = build_config(NAME, **shape, mhc_collapse=collapse)
        found.append(MHC.count_parameters(config))
        tensors = [t for n in (0, 1) for t in own_tensors(config, n)]
        decayed = {t.megatron for t in tensors if len(t.shape) > 1}
        assert {name.rpartition(".")[2] for name in decayed} <= {"weight", "fn"}
    assert tuple(found) == counts


def test_keys_are_megatrons():
    """Of Megatron-LM's hyper_connection.py, so that it can read the checkpoint."""
    names = ("mapping_proj.weight", "alpha_pre", "alpha_post", "alpha_res", "bias")
    found = {t.placed(3).megatron: t.shape for t in own_tensors(build_config(NAME, **SHAPE), 3)}
    shapes = ((24, 96), (1,), (1,), (1,), (24,))
    assert found == {
        f"decoder.layers.2.{place}_hyper_connection.{name}": shape
        for place in ("self_attention", "mlp")
        for name, shape in zip(names, shapes, strict=True)
    }


@pytest.mark.parametrize("given", [{"hc_streams": 0}, {"mhc_sinkhorn_iterations": 0}], ids=str)
def test_no_streams_and_no_rounds_are_refused(given):
    (name,) = given
    with pytest.raises(ValueError, match=rf"{name} \(0\) must be at least 1\. Leave it out for"):
        build_config(NAME, **SHAPE, **given)
