"""The truth itself is checked against models it was not written from, and against the equation."""

import math

import pytest
import torch
import transformers

from megatron_satformer.model.architectures import PLAIN, TABLE
from megatron_satformer.model.reference.decoder import Decoder, apply_rope
from megatron_satformer.model.reference.satformer import GATES
from tests.models import build_twin

SHAPE = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}


def build(**options) -> Decoder:
    """A model whose parameters are all random, norms and lambdas included."""
    return build_twin(**{**SHAPE, **options})


def random_ids(b: int = 2, s: int = 13) -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], (b, s), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Qwen3", {"qk_norm": True}),
        ("Llama", {"qk_norm": False}),
        ("Qwen2", {"qk_norm": False, "attention_bias": True}),
    ],
)
def test_transformer_equals_published_models(name, options, tied):
    """Architecture transformer is Qwen3 with QK-norm, Llama without, Qwen2 with q, k, v biases."""
    ours = build(architecture=PLAIN, tie_word_embeddings=tied, **options)
    config = getattr(transformers, f"{name}Config")(
        **SHAPE,
        rms_norm_eps=ours.config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": ours.config.rope_theta},
        tie_word_embeddings=tied,
        **({} if name == "Qwen2" else {"attention_bias": False}),
    )
    config.head_dim = SHAPE["head_dim"]
    theirs = getattr(transformers, f"{name}ForCausalLM")(config)
    theirs.load_state_dict(ours.state_dict())
    ids = random_ids()
    out, expected = ours(ids, labels=ids.roll(-1, 1)), theirs(ids).logits
    torch.testing.assert_close(out.logits, expected, rtol=1e-5, atol=1e-5)
    out.logits.square().mean().backward()
    expected.square().mean().backward()
    theirs_grads = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs_grads[key].grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_equation_written_out():
    """One token at a time, one head at a time, in Python floats."""
    model = build(value_gate="sigmoid", value_gate_bias=True)
    attention = model.model.layers[2].self_attn
    x, v, v1 = torch.randn(1, 3, 24), torch.randn(1, 3, 2, 6), torch.randn(1, 3, 2, 6)
    _, mixed, _, alpha = attention.mix(x, v, v, (v1,))
    weight, bias = attention.value_gate.weight, attention.value_gate.bias
    for t in range(3):
        for g in range(2):
            logit = sum(float(weight[g, i] * x[0, t, i]) for i in range(24)) + float(bias[g])
            gate = 1 / (1 + math.exp(-logit))
            assert abs(float(alpha[0, t, g]) - gate) < 1e-5
            for d in range(6):
                expected = float(v[0, t, g, d]) + gate * float(v1[0, t, g, d])
                assert abs(float(mixed[0, t, g, d]) - expected) < 1e-5


@torch.no_grad()
def test_resformer_equation():
    model = build(architecture="resformer", value_residual_last_k=2)
    lambdas = model.model.value_residual
    assert lambdas.lambda_logits.shape == (2,)
    lambda1 = [float(lambdas.lambda_scale) * p for p in lambdas.lambda_logits.softmax(-1).tolist()]
    v, v1 = torch.randn(1, 3, 2, 6), torch.randn(1, 3, 2, 6)
    for n in range(4):
        attention = model.model.layers[n].self_attn
        _, mixed, carried, shown = attention.mix(None, v, v, (*model.start(None), v1))
        assert shown is None
        assert carried[1] is v1
        expected = v if n < 2 else lambda1[n - 2] * v1 + float(attention.value_lambda2) * v
        torch.testing.assert_close(mixed, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("form", "weights"),
    [
        ({"resformer_form": "identity"}, (0.5, 0.5)),
        ({"resformer_form": "sparse"}, (5.0, 1.0)),
        ({"resformer_form": "sparse", "resformer_lambda": 2.0}, (2.0, 1.0)),
        ({"resformer_form": "svformer"}, (1.0, 0.0)),
        ({"resformer_form": "learnable"}, None),
    ],
    ids=str,
)
def test_forms_of_resformer(form, weights):
    model = build(architecture="resformer", value_residual_last_k=2, **form)
    attention, v, v1 = model.model.layers[2].self_attn, *torch.randn(2, 1, 3, 2, 6)
    if weights is None:
        weights = attention.value_lambda1, attention.value_lambda2
        assert weights[0] is not weights[1]
    _, mixed, _, _ = attention.mix(None, v, v, (*model.start(None), v1))
    torch.testing.assert_close(mixed, weights[0] * v1 + weights[1] * v)
    own = [name for name in model.state_dict() if "lambda" in name]
    assert len(own) == (4 if form["resformer_form"] == "learnable" else 0)


@torch.no_grad()
@pytest.mark.parametrize("gate", ["lerp", "lerp_channels"])
def test_convex_gates_share_what_there_is(gate):
    """Each number of V' lies between those of V and V_1, at the share that alpha says."""
    attention = build(value_gate=gate, value_gate_rank=None).model.layers[2].self_attn
    x, v, v1 = torch.randn(1, 3, 24), torch.randn(1, 3, 2, 6), torch.randn(1, 3, 2, 6)
    _, mixed, _, shown = attention.mix(x, v, v, (v1,))
    share = (mixed - v) / (v1 - v)
    assert share.min() > 0
    assert share.max() < 1
    torch.testing.assert_close(share.mean(-1), shown, rtol=1e-3, atol=1e-4)
    assert (share.std(-1).max() > 1e-3) == (gate == "lerp_channels")


def test_resformer_at_init():
    """lambda1 = L / (number of mixing layers), lambda2 = 1/2, as published."""
    model = build_twin("resformer", **SHAPE, scale=0.0)
    lambdas = model.model.value_residual
    assert lambdas.lambda_logits.tolist() == [0.0] * 3
    assert lambdas.lambda_scale.tolist() == [4.0]
    assert [layer.self_attn.value_lambda2.item() for layer in model.model.layers[1:]] == [0.5] * 3


def test_gates():
    z = torch.tensor([[-1.0, 0.5, 2.0]])
    e = [math.exp(v) for v in (-1.0, 0.5, 2.0)]
    sig = [1 / (1 + math.exp(-v)) for v in (-1.0, 0.5, 2.0)]
    expected = {
        "relu": [0.0, 0.5, 2.0],
        "sigmoid": sig,
        "softmax": [3 * v / sum(e) for v in e],
        "softmax_sigmoid": [3 * v / sum(e) * g for v, g in zip(e, sig, strict=True)],
        "tanh": [math.tanh(v) for v in (-1.0, 0.5, 2.0)],
        "identity": [-1.0, 0.5, 2.0],
        "softplus": [math.log(1 + v) for v in e],
        "leaky_relu": [-0.01, 0.5, 2.0],
        "lerp": sig,
    }
    assert set(GATES) == set(expected)
    for name, gate in GATES.items():
        torch.testing.assert_close(gate(z), torch.tensor([expected[name]]))


@pytest.mark.parametrize("gate", ["identity", "tanh", "relu"])
def test_zero_gate_is_the_transformer(gate):
    sat = build(value_gate=gate)
    for layer in sat.model.layers[1:]:
        torch.nn.init.zeros_(layer.self_attn.value_gate.weight)
    plain = build(architecture=PLAIN)
    shared = {k: v for k, v in sat.state_dict().items() if "value_gate" not in k}
    plain.load_state_dict(shared)
    ids = random_ids()
    out = sat(ids)
    assert torch.equal(out.logits, plain(ids).logits)
    assert all(not alpha.any() for alpha in out.shown)


@pytest.mark.parametrize("last_k", [None, 1, 3])
def test_mixing_layers(last_k):
    model = build(value_residual_last_k=last_k)
    mixing = [n for n, layer in enumerate(model.model.layers) if layer.self_attn.mixes]
    assert mixing == list(range(4 - (last_k or 3), 4))
    alphas = model(random_ids()).shown
    assert [alpha.shape for alpha in alphas] == [(2, 13, 2)] * len(mixing)
    gated = {key.split(".")[2] for key in model.state_dict() if "value_gate" in key}
    assert gated == {str(n) for n in mixing}


@pytest.mark.parametrize("architecture", TABLE)
def test_causal_and_prefix_stable(architecture):
    model, ids = build(architecture=architecture), random_ids()
    whole = model(ids).logits
    for end in (1, 7):
        torch.testing.assert_close(model(ids[:, :end]).logits, whole[:, :end], rtol=1e-5, atol=1e-5)


def test_gradient_of_v1_reaches_the_first_layer_from_every_layer():
    """Layer 1's values get gradient through V1 even when its own attention output is cut off."""
    model = build(value_gate="identity")
    torch.nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
    model(random_ids()).logits.square().mean().backward()
    assert model.model.layers[0].self_attn.v_proj.weight.grad.abs().max() > 0


def test_rope_is_a_rotation_by_relative_position():
    q = torch.randn(1, 1, 1, 6).expand(1, 9, 1, 6)
    k = torch.randn(1, 1, 1, 6).expand(1, 9, 1, 6)
    q, k = apply_rope(q, 1e4)[0, :, 0], apply_rope(k, 1e4)[0, :, 0]
    scores = q @ k.T
    for distance in range(9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_loss_ignores_minus_100():
    model, ids = build(), random_ids()
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    out = model(ids, labels)
    log_p = out.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    torch.testing.assert_close(out.loss, -log_p.mean())
