"""Attention over what sublayers made: against the equation, the twin and a plain Transformer."""

import pytest
import torch

from megatron_satformer.model.architectures.attnres import ATTNRES, own_tensors
from megatron_satformer.model.reference.attnres import AttnRes, AttnResTwinConfig
from tests.models import build_config

NAME = ATTNRES.name
RANKS = "tests.model.ranks"
SHAPE = {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 4}
WIDE = {"architecture": NAME, "hidden_size": 2400}
TWIN = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
FORMS = [
    {"attnres_block_layers": 2},
    {"attnres_block_layers": 3},
    {"attnres_block_layers": 5},
    {"attnres_form": "full"},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@torch.no_grad()
def test_equation_written_out(form):
    """What every sublayer made is kept, and summed up by the number of its block."""
    model = AttnRes(AttnResTwinConfig(**TWIN, **form)).double()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    ids = torch.randint(31, (2, 7))
    made = [(0, model.model.embed_tokens(ids))]  # block of each, what it is

    def read(query):
        blocks = [sum(x for at, x in made if at == b) for b in sorted({at for at, _ in made})]
        keys = [torch.nn.functional.rms_norm(b, (24,), query.gain, 1e-6) for b in blocks]
        scores = torch.stack([key @ query.query for key in keys])
        return sum(p[..., None] * b for p, b in zip(scores.softmax(0), blocks, strict=True))

    for n, layer in enumerate(model.model.layers):
        block = 1 + n // form.get("attnres_block_layers", 1)
        places = (2 * n + 1, 2 * n + 2) if "attnres_form" in form else (block, block)
        made.append((places[0], layer.attend(read(layer.attn_res), ())[0]))
        made.append((places[1], layer.feed(read(layer.mlp_res))))
    logits = model.lm_head(model.model.norm(read(model.model.final_res)))
    torch.testing.assert_close(model(ids).logits, logits)


@pytest.mark.parametrize("form", FORMS[1::2], ids=str)
def test_every_form_equals_the_twin(on_ranks, form):
    """In float64, gradients included; the default form is in the table's tests."""
    given = {"architecture": NAME, "num_layers": 5, "add_qkv_bias": True, **form}
    on_ranks(1, f"{RANKS}:equals_reference", given)


@pytest.mark.parametrize("form", [{}, {"attnres_form": "full"}], ids=str)
def test_starts_as_the_transformer(on_ranks, form):
    """With linear biases too, which the function in the place of bias-dropout-add adds."""
    given = {"architecture": NAME, "add_bias_linear": True, **form}
    on_ranks(1, f"{RANKS}:starts_as_a_transformer", given)


@pytest.mark.parametrize("form", [{}, {"attnres_form": "full"}], ids=str)
def test_what_is_held_for_backward(on_ranks, form):
    """Sources by reference: no keys, no copies.

    The two sources that a layer makes or adds to take the place of a Transformer's residuals; what
    its two norms read is held beside them.
    """
    on_ranks(1, f"{RANKS}:holds_for_backward", WIDE | form, 2.1)


@pytest.mark.slow
@pytest.mark.parametrize("form", [{"attnres_block_layers": 1}, {"attnres_form": "full"}], ids=str)
def test_held_grows_linearly_with_many_sources(on_ranks, form):
    on_ranks(1, f"{RANKS}:held_grows_linearly", {"architecture": NAME, **form})


def test_widths_of_four_stages():
    """In units of h, the newest source included: 1 + ceil(n / S), and 2n + 1 in the full form."""
    shape = {"num_layers": 24, "hidden_size": 8, "num_attention_heads": 2}
    for form, wanted in (
        ({}, [3, 5, 7]),  # S = 24 / 8
        ({"attnres_block_layers": 5}, [3, 4, 5]),
        ({"attnres_form": "full"}, [13, 25, 37]),
    ):
        config = build_config(NAME, **shape, **form)
        assert [1 + ATTNRES.carry(config, n).streams for n in (6, 12, 18)] == wanted


@pytest.mark.parametrize(("layers", "width", "count"), [(11, 768, 35_328), (24, 2048, 200_704)])
def test_parameters(layers, width, count):
    """4 h L + 2 h in both forms, as published; none of them has two axes, so none is decayed."""
    for form in ("block", "full"):
        config = build_config(
            NAME, num_layers=layers, hidden_size=width, num_attention_heads=4, attnres_form=form
        )
        assert ATTNRES.count_parameters(config) == count
        assert {len(t.shape) for n in range(2) for t in own_tensors(config, n)} == {1}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"attnres_block_layers": 0}, r"attnres_block_layers \(0\) must be at least 1 and at most"),
        ({"attnres_block_layers": 5}, r"\(5\) must be at least 1 and at most num_layers \(4\)"),
        (
            {"attnres_block_layers": 2, "attnres_form": "full"},
            r"attnres_block_layers \(2\) must be left out with attnres_form \(full\)",
        ),
    ],
)
def test_blocks_of_no_length_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        build_config(NAME, **SHAPE, **given)


def test_the_report_names_the_form():
    assert build_config(NAME, **SHAPE).summary == "attnres, blocks of 1 layers"
    assert build_config(NAME, **SHAPE, attnres_form="full").summary == "attnres, full"
