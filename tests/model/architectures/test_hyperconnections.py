"""Streams of Hyper-Connections: against the equation, the twin and a plain Transformer."""

from argparse import ArgumentParser

import pytest
import torch

from megatron_satformer.arguments import add_arguments
from megatron_satformer.model.architectures.hyperconnections import (
    HYPERCONNECTIONS,
    own_tensors,
    starting_alpha,
    without_residual,
)
from megatron_satformer.model.reference.hyperconnections import (
    HyperConnection,
    HyperConnectionsTwinConfig,
)
from tests.models import build_config

NAME = HYPERCONNECTIONS.name
RANKS = "tests.model.ranks"
SHAPE = {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 4}
TWIN = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
# number of streams, dynamic, tanh, and the norm's form where another
FORMS = [
    (4, True, True),
    (3, True, False),
    (2, False, True),
    (1, True, True),
    (2, True, True, "baseline"),
]


def options(streams, dynamic, tanh, form="paper"):
    return {"hc_streams": streams, "hc_dynamic": dynamic, "hc_tanh": tanh, "hc_form": form}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_equation_written_out(form):
    """Sums over streams one by one, for one token."""
    n = form[0]
    config = HyperConnectionsTwinConfig(**TWIN, **options(*form))
    connection = HyperConnection(config, 5).double()
    torch.manual_seed(0)
    for parameter in connection.parameters():
        parameter.copy_(torch.randn_like(parameter))
    # so small that the epsilon shows
    streams, seen = torch.randn(n, 24, dtype=torch.float64) * 1e-3, []
    got = connection(streams[None, None], lambda read: seen.append(read) or read.sin())[0, 0]

    beta, alpha = connection.static_beta.clone(), connection.static_alpha.view(n, n + 1).clone()
    if form[1]:
        phi = torch.tanh if form[2] else torch.clone
        normed = torch.nn.functional.rms_norm(streams, (24,), eps=config.rms_norm_eps)
        if config.hc_form == "baseline":
            wide = torch.nn.functional.rms_norm(streams, (24,), eps=2**-23)
            normed = wide * connection.norm_gain
        for j in range(n):
            own = phi(normed[j] @ connection.dynamic_beta_proj)[0]
            beta[j] += connection.dynamic_beta_scale[0] * own
            own = phi(normed[j] @ connection.dynamic_alpha_proj)
            alpha[j] += connection.dynamic_alpha_scale[0] * own
    read = sum(alpha[j, 0] * streams[j] for j in range(n))
    torch.testing.assert_close(seen[0][0, 0], read)
    for i in range(n):
        kept = sum(alpha[j, 1 + i] * streams[j] for j in range(n))
        torch.testing.assert_close(got[i], beta[i] * read.sin() + kept)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_the_twin(on_ranks, form):
    """In float64, where each gradient can be seen by itself."""
    on_ranks(1, f"{RANKS}:equals_reference", {"architecture": NAME, **options(*form)})


@pytest.mark.parametrize("form", FORMS)
def test_starts_as_the_transformer(on_ranks, form):
    """With linear biases too, which the function in the place of bias-dropout-add adds."""
    given = {"architecture": NAME, "add_bias_linear": True, **options(*form)}
    on_ranks(1, f"{RANKS}:starts_as_a_transformer", given)


@pytest.mark.parametrize(("dynamic", "weights"), [(True, 0.3), (False, 0.01)])
def test_what_is_held_for_backward(on_ranks, dynamic, weights):
    """Per sublayer the streams but one, what is read and what is computed; no copies of streams.

    The projections of a sublayer, joined, weigh something beside these few tokens.
    """
    given = {"architecture": NAME, "hidden_size": 2400, "hc_dynamic": dynamic}
    on_ranks(1, f"{RANKS}:holds_for_backward", given, 2 * (4 + 1) + weights)


def test_full_recompute_holds_the_streams(on_ranks):
    given = {"architecture": NAME, "hidden_size": 2400, "recompute_granularity": "full"}
    given |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    on_ranks(1, f"{RANKS}:holds_for_backward", given, 3.0)


@pytest.mark.parametrize(("layers", "counts"), [(11, (528, 101_948)), (24, (1_152, 591_072))])
def test_parameters(layers, counts):
    """As published: n (n + 2) of a connection, and h (n + 2) + 2 where weights are per token."""
    width = {11: 768, 24: 2048}[layers]
    shape = {"num_layers": layers, "hidden_size": width, "num_attention_heads": 4}
    configs = [build_config(NAME, **shape, hc_dynamic=dynamic) for dynamic in (False, True)]
    assert tuple(map(HYPERCONNECTIONS.count_parameters, configs)) == counts


def test_weight_decay_is_for_projections_alone():
    """Megatron decays what has more than one axis."""
    tensors = own_tensors(build_config(NAME, **SHAPE), 2)
    decayed = {t.megatron.rpartition(".")[2] for t in tensors if len(t.shape) > 1}
    assert decayed == {"dynamic_beta_proj", "dynamic_alpha_proj"}
    more = own_tensors(build_config(NAME, **SHAPE, hc_form="baseline"), 2)
    added = {t.megatron: t.shape for t in more if t.megatron not in {u.megatron for u in tensors}}
    names = ("self_attention", "mlp")
    assert added == {f"{name}_hyper_connection.norm_gain": (24,) for name in names}


def test_sublayers_start_by_reading_one_stream_in_turn():
    read = [starting_alpha(q, 3)[:, 0].argmax().item() for q in range(6)]
    assert read == [0, 1, 2, 0, 1, 2]
    assert torch.equal(starting_alpha(4, 3)[:, 1:], torch.eye(3))
    tensors = [t for n in (1, 2) for t in own_tensors(build_config(NAME, **SHAPE), n)]
    starts = [t.start(t.shape).view(4, 5) for t in tensors if "static_alpha" in t.megatron]
    assert [start[:, 0].argmax().item() for start in starts] == [0, 1, 2, 3]


def test_bias_and_dropout_without_residual():
    x, bias = torch.ones(3, 2, 5, dtype=torch.bfloat16), torch.full((5,), 2**-9)
    residual = torch.full((3, 2, 5), 100.0)
    for training in (False, True):
        out = without_residual(training, False)((x, bias), residual, 0.0)
        assert torch.equal(out, torch.full((3, 2, 5), 1 + 2**-9))  # in the residual's dtype
    assert without_residual(True, False)((x, None), x, 0.0) is x
    torch.manual_seed(0)
    dropped = without_residual(True, False)((torch.ones(1000), None), residual, 0.5)
    assert set(dropped.tolist()) == {0.0, 2.0}
    assert torch.equal(without_residual(False, False)((x, None), x, 0.5), x)


@pytest.mark.parametrize(("scaled", "expected"), [(False, 0.01), (True, 0.01 / 8**0.5)])
def test_output_projections_start_smaller_on_request(scaled, expected):
    drawn = []
    for rescale in (False, True):
        config = build_config(NAME, **SHAPE, scaled_output_init=scaled, hc_rescale_output=rescale)
        weight = torch.empty(400, 400)
        config.output_layer_init_method(weight)
        drawn.append(weight.std().item())
    assert drawn == pytest.approx([2 * expected, expected], rel=0.02)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"hc_streams": 0}, r"hc_streams \(0\) must be at least 1"),
        (
            {"hc_dynamic": False, "hc_tanh": False},
            r"hc_tanh \(False\) must come with hc_dynamic \(True\), not \(False\)",
        ),
        (
            {"hc_dynamic": False, "hc_form": "baseline"},
            r"hc_form \(baseline\) must come with hc_dynamic \(True\), not \(False\)",
        ),
        (
            {"hc_rescale_output": True, "from_transformer": True},
            r"hc_rescale_output \(True\) must be left out with from_transformer \(True\)",
        ),
    ],
)
def test_options_without_effect_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        build_config(NAME, **SHAPE, **given)


@pytest.mark.parametrize(
    ("words", "expected"),
    [("", (True, True)), ("--no-hc-tanh", (True, False)), ("--no-hc-dynamic", (False, True))],
)
def test_what_is_on_by_default_has_a_flag_for_and_against_it(words, expected):
    parser = add_arguments(ArgumentParser())
    parsed = parser.parse_args(["--hc-dynamic", "--hc-tanh", *words.split()])
    assert (parsed.hc_dynamic, parsed.hc_tanh) == expected
    assert (parser.get_default("hc_dynamic"), parser.get_default("hc_tanh")) == (True, True)
    assert "--hc-dynamic, --no-hc-dynamic" in parser.format_help()
