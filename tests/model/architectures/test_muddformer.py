"""What MUDDFormer's sums read and cost, its options, and where its parameters start."""

from types import SimpleNamespace

import pytest
import torch

from megatron_satformer.model.architectures.mudd_sums import (
    Aggregate,
    aggregate_tensors,
    starting_projection,
)
from megatron_satformer.model.architectures.muddformer import MUDDFORMER, ffn_width, own_tensors
from megatron_satformer.model.parameters import count_parameters
from tests.models import build_config, build_twin

SHAPE = {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 4}
RANKS = "tests.model.ranks"


def build(**options):
    return build_config("muddformer", **SHAPE, **options, use_cpu_initialization=True)


def test_widths_of_four_stages():
    """In units of h, X_n included: nothing is dropped, all is read at the end."""
    config = build()
    assert [1 + MUDDFORMER.carry(config, n).streams for n in (6, 12, 18)] == [7, 13, 19]


@pytest.mark.parametrize(
    "options",
    [
        {"mudd_prepost_norm": True},
        {"mudd_ffn_realloc": True, "ffn_hidden_size": 300},
        {"mudd_prepost_norm": True, "attention_output_gate": False, "num_query_groups": 6},
        {"mudd_form": "released"},
        {"mudd_form": "baseline", "mudd_ffn_realloc": True, "ffn_hidden_size": 512},
    ],
    ids=str,
)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_options_equal_the_twin(on_ranks, options, ranks):
    on_ranks(ranks, f"{RANKS}:equals_reference", {"architecture": "muddformer", **options})


@pytest.mark.parametrize(
    ("width", "layers", "form", "widths"),
    [
        (3072, 11, "paper", [1536, 1792, 2176]),
        (4096, 18, "released", [2048, 2304, 2560]),
        (64, 4, "paper", [128, 128, 128]),
        (3072, 11, "baseline", [1536, 1792, 2048]),
        (512, 5, "baseline", [256, 256, 512]),  # 384 lies between two
        (64, 4, "baseline", [256, 256, 256]),
    ],
)
def test_mlps_grow_from_half_to_one_and_a_half(width, layers, form, widths):
    given = SimpleNamespace(
        mudd_ffn_realloc=True, num_layers=layers, ffn_hidden_size=width, mudd_form=form
    )
    found = [ffn_width(given, n) for n in range(1, layers + 1)]
    assert found[:3] == widths
    assert found[-1] == max(found[0], width * 3 // 2)
    assert found == sorted(found)
    given.mudd_ffn_realloc = False
    assert {ffn_width(given, n) for n in range(1, layers + 1)} == {width}


def test_mlps_of_other_widths_are_counted():
    """Their sum is that of the plain ones but for rounding; none here."""
    shape = {"num_layers": 5, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 512}
    plain, grown = (
        count_parameters(build_config("muddformer", **shape, mudd_ffn_realloc=given), 128)
        for given in (False, True)
    )
    assert plain == grown


def test_projections_start_alike_everywhere_and_differ_between_layers_and_seeds():
    starts = [starting_projection((4 * n, 24)) for n in (2, 3, 4)] + [starting_projection((5, 24))]
    for i, one in enumerate(starts):
        assert torch.equal(one, starting_projection(tuple(one.shape)))
        assert not torch.equal(one, starting_projection(tuple(one.shape), seed=1))
        for other in starts[:i]:
            assert not torch.isclose(other[:1], one[:1]).any()
    assert starting_projection((400, 600)).var().item() == pytest.approx(1 / 600, rel=0.02)


def test_the_seed_is_megatrons():
    torch.manual_seed(0)
    first, second, third = (
        Aggregate(config, aggregate_tensors(config, 2), None).w1
        for config in (build(seed=seed) for seed in (7, 7, 8))
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("normed", [False, True])
def test_starts_as_identity_and_is_decayed_where_it_projects(normed):
    config = build(mudd_prepost_norm=normed, sequence_parallel=True, tensor_model_parallel_size=2)
    aggregate = Aggregate(config, aggregate_tensors(config, 2), None)
    history = [torch.randn(5, 2, 24) for _ in range(3)]
    for out in aggregate(history):
        torch.testing.assert_close(out, history[-1], rtol=0, atol=0)
    assert all(p.sequence_parallel for p in aggregate.parameters())
    matrices = [name for name, p in aggregate.named_parameters() if p.dim() > 1]
    assert matrices == ["w1", "w2"]


@pytest.mark.parametrize("normed", [False, True])
def test_holds_its_sources_by_reference(normed):
    """Of all that backward needs, nothing of the size of a source but the sources themselves."""
    config = build(mudd_prepost_norm=normed)
    aggregate = Aggregate(config, aggregate_tensors(config, 3), None)
    history = [torch.randn(64, 2, 24, requires_grad=True) for _ in range(4)]
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        outs = aggregate(history)
    sources = {x.data_ptr() for x in history}
    large = [t for t in held if t.numel() >= history[0].numel() and t.data_ptr() not in sources]
    assert [tuple(t.shape) for t in large if t.shape[-1] == 24 and t.dim() == 3] == []
    torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    assert all(x.grad is not None for x in history)


def test_parameters_of_the_formula():
    """Norms of k and v, and W1, W2, a of every sum."""
    config = build()
    h, layers = 24, 4
    sums = [4 * n for n in range(2, layers + 1)] + [layers + 1]
    expected = 2 * h * (layers - 1) + sum(h * k + k * k + k for k in sums)
    assert MUDDFORMER.count_parameters(config) == expected
    assert not own_tensors(config, 0)
    assert not own_tensors(config, 1)
    baseline = build(mudd_form="baseline")
    assert MUDDFORMER.count_parameters(baseline) == expected + 2 * h


def test_the_released_form_is_wider():
    """Its multiples of 64 lie above what the equation has, behind the last layer above 4 times."""
    config = build(mudd_form="released")
    w1 = [aggregate_tensors(config, n)[0].shape for n in range(1, 5)]
    assert w1 == [(64, 24), (64, 24), (64, 24), (64, 24)]
    config.num_layers = 32
    assert [aggregate_tensors(config, n)[0].shape[0] for n in (14, 15, 31, 32)] == [
        64,
        128,
        192,
        192,
    ]
    assert [t.shape for t in aggregate_tensors(config, 15)[1:]] == [(64, 128), (64,)]


@torch.no_grad()
def test_equation_written_out():
    """One token, one way and one number at a time."""
    shape = {"vocab_size": 17, "hidden_size": 6, "intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    twin = build_twin("muddformer", **shape, **heads)
    aggregate = twin.model.layers[0].aggregate
    x = [torch.randn(1, 3, 6) for _ in range(2)]
    ways = aggregate((x[0], x[1]))
    assert len(ways) == 4
    rms = (x[1].square().mean(-1) + 1e-6).sqrt()
    for t in range(3):
        hidden = torch.nn.functional.gelu(aggregate.w1 @ (x[1][0, t] / rms[0, t]))
        weights = aggregate.w2 @ hidden + aggregate.static
        for c in range(4):
            expected = weights[2 * c] * x[0][0, t] + weights[2 * c + 1] * x[1][0, t]
            torch.testing.assert_close(ways[c][0, t], expected)


REALLOC = r"mudd_ffn_realloc \(True\) must come with "


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mudd_ffn_realloc": True, "num_layers": 1}, ValueError, REALLOC + r"num_layers \(1\)"),
        ({"mudd_ffn_realloc": True, "num_moe_experts": 2}, ValueError, REALLOC + "dense layers"),
        ({"mudd_ffn_realloc": True, "from_transformer": True}, ValueError, REALLOC + "weights"),
        (
            {"mudd_ffn_realloc": True, "tensor_model_parallel_size": 3, "num_attention_heads": 3},
            ValueError,
            REALLOC + r"tensor_model_parallel_size \(3\) a divisor of 128",
        ),
        (
            {"num_query_groups": 2, "tensor_model_parallel_size": 4},
            ValueError,
            r"num_query_groups \(2\) must be a multiple of .* \(4\): k and v .* Use TP 1 or 2\.",
        ),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
            NotImplementedError,
            r"recompute_modules \(layernorm\) is not supported",
        ),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        build_config("muddformer", **SHAPE | options)


def test_summary():
    assert build().summary == "muddformer"
    both = build(mudd_prepost_norm=True, mudd_ffn_realloc=True, ffn_hidden_size=1024)
    assert both.summary == "muddformer, normed sums, MLPs 512 to 1536 wide"
