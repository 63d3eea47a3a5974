"""The exported modelling code equals the plain twins, and does what transformers' models do."""

import fnmatch
import os
import subprocess
import sys

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM

from megatron_satformer.checkpoint.hugging_face.code import config_class, model_class
from megatron_satformer.config import DecoderOptions
from megatron_satformer.model.architectures import PLAIN, TABLE, find_architecture
from megatron_satformer.model.reference.satformer import GATES
from tests.models import build_exported, build_twin, save_exported

SHAPE = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
# float32 against float32; gradients as norm of the difference over the norm
TOLERANCE = {"logits": 1e-5, "gradient": 5e-5}
ARCHITECTURES = list(TABLE)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# Enough to show a wrong cache; more of the default, whose caches all others share.
NEW_TOKENS = {DecoderOptions.architecture: 64}
SEEDS = {"lime": 0}  # of weights that write more than one word, where 3 does not
OWN = [name for name in TABLE if find_architecture(name).model_options]  # by options
MIXING = [name for name in OWN if "value_residual_last_k" in find_architecture(name).own_options]


def build_pair(seed: int = 0, attention: str = "sdpa", scale: float = 0.3, **options):
    """Reference and exported model with the same random parameters."""
    reference = build_twin(**{**SHAPE, **options}, seed=seed, scale=scale)
    model = build_exported(reference, max_position_embeddings=256).eval()
    model.set_attn_implementation(attention)
    return reference, model


def random_ids(b: int = 2, s: int = 13, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 67, (b, s), generator=torch.Generator().manual_seed(seed))


CASES = [
    *({"architecture": a} for a in ARCHITECTURES),
    *({"architecture": a, "num_key_value_heads": 4, "qk_norm": False} for a in ARCHITECTURES),
    *({"value_gate": gate, "value_gate_bias": True} for gate in GATES),
    *({"value_gate": gate} for gate in ("lerp_channels", "constant")),
    {"value_gate": "tanh", "value_gate_offset": 1.0},
    *(
        {"architecture": a, "resformer_form": form, "value_residual_last_k": 2}
        for a in OWN
        if "resformer_form" in find_architecture(a).own_options
        for form in ("learnable", "identity", "sparse", "svformer")
    ),
    *({"architecture": a, "value_residual_last_k": 2} for a in MIXING),
    {"attention_bias": True, "tie_word_embeddings": False, "num_key_value_heads": 1},
]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
def test_equals_reference(options, attention):
    reference, model = build_pair(attention=attention, **options)
    ids = random_ids()
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    expected, out = reference(ids, labels), model(ids, labels=ids, output_gates=True)
    limit = TOLERANCE["logits"] * expected.logits.abs().max().item()
    torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=limit)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert len(out.gates) == len(expected.shown)
    for ours, theirs in zip(out.gates, expected.shown, strict=True):
        assert ours.shape == (2, 13, reference.config.num_key_value_heads)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    expected.loss.backward()
    out.loss.backward()
    grads = dict(reference.named_parameters())
    assert set(grads) == {name for name, _ in model.named_parameters()}
    # A coefficient's is a sum over all tokens that may all but cancel: it is seen beside those of
    # the other layers.
    own = find_architecture(model.config.architecture).all_tensors(model.config)
    flat = [name for _, tensor in own if len(tensor.shape) == 1 for name in tensor.hf]
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        beside = [other for other in flat if other.endswith(kind)] if name in flat else [name]
        scale = max(grads[other].grad.norm() for other in beside)
        if scale == 0:  # W_v of a layer that attends to V_1 alone
            assert parameter.grad.norm() == 0
            continue
        difference = (parameter.grad - grads[name].grad).norm() / scale
        assert difference < TOLERANCE["gradient"], (name, difference)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_with_and_without_cache(architecture):
    """The reference without any cache, generate without and with caches."""
    count = NEW_TOKENS.get(architecture, 24)
    options = {"architecture": architecture, "tie_word_embeddings": False}
    reference, model = build_pair(SEEDS.get(architecture, 3), scale=0.8, **options)
    prompt = random_ids(b=2, s=5)
    ids = prompt
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, reference(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert ids[0, 5:].unique().numel() > count // 8, "degenerate text proves nothing"
    options = {**GREEDY, "max_new_tokens": count}
    for how in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        how = {**how, "disable_compile": True} if "cache_implementation" in how else how
        assert torch.equal(model.generate(prompt, **options, **how), ids), how


@pytest.mark.parametrize(
    ("architecture", "attention"), [*((a, "sdpa") for a in ARCHITECTURES), ("satformer", "eager")]
)
def test_left_padded_batch_equals_single(architecture, attention):
    seed, options = SEEDS.get(architecture, 3), {"tie_word_embeddings": False, "scale": 0.8}
    _, model = build_pair(seed, architecture=architecture, attention=attention, **options)
    prompts = [random_ids(1, n, seed=n)[0] for n in (3, 11, 7)]
    options = {**GREEDY, "max_new_tokens": NEW_TOKENS.get(architecture, 24)}
    singles = [model.generate(p[None], **options)[0, len(p) :] for p in prompts]
    assert all(single.unique().numel() > len(single) // 8 for single in singles)
    batch = torch.zeros(3, 11, dtype=torch.long)
    mask = torch.zeros(3, 11, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        batch[row, 11 - len(prompt) :], mask[row, 11 - len(prompt) :] = prompt, 1
    static = {"cache_implementation": "static", "disable_compile": True}
    for how in ({}, {"use_cache": False}, static):
        out = model.generate(batch, attention_mask=mask, **options, **how)[:, 11:]
        for row, single in enumerate(singles):
            assert torch.equal(out[row], single), (how, row)


def test_beams_and_sampling():
    _, model = build_pair(tie_word_embeddings=False, scale=0.8)
    prompt = random_ids(1, 5)
    options = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(prompt, num_beams=3, do_sample=False, **options)
    plain = model.generate(prompt, num_beams=3, do_sample=False, use_cache=False, **options)
    assert torch.equal(cached, plain)
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        samples.append(model.generate(prompt, do_sample=True, use_cache=use_cache, **options))
    assert torch.equal(*samples)


def test_loss_and_kept_logits_are_llamas():
    """Labels, -100, num_items_in_batch and logits_to_keep mean what they mean there."""
    options = {"qk_norm": False, "architecture": PLAIN, "tie_word_embeddings": False}
    _, model = build_pair(**options)
    values = {name: getattr(model.config, name) for name in SHAPE}
    llama = LlamaForCausalLM(
        LlamaConfig(**values, rms_norm_eps=1e-6, tie_word_embeddings=False)
    ).eval()
    llama.load_state_dict(model.state_dict())
    ids = random_ids()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    for extra in ({}, {"num_items_in_batch": torch.tensor(7)}):
        ours, theirs = model(ids, labels=labels, **extra), llama(ids, labels=labels, **extra)
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
    assert ours.loss > 1.5 * model(ids, labels=labels).loss
    for keep in (1, 3, torch.tensor([0, 5])):
        ours, theirs = (m(ids, logits_to_keep=keep).logits for m in (model, llama))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    logits, of_each = model(ids).logits, torch.tensor([[0, 5], [12, 3]])
    kept = model(ids, logits_to_keep=of_each).logits
    torch.testing.assert_close(kept[1], logits[1, [12, 3]])
    mask = labels != -100
    torch.testing.assert_close(model(ids, logits_to_keep=mask).logits, logits[mask])


def test_outputs():
    _, model = build_pair(attention="eager", value_residual_last_k=2)
    ids = random_ids()
    out = model(ids, output_hidden_states=True, output_attentions=True, output_gates=True)
    assert len(out.hidden_states) == 5
    assert len(out.attentions) == 4
    assert len(out.gates) == 2
    assert out.attentions[0].shape == (2, 4, 13, 13)
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    # each state is what its layer read: attention's weights times the cached values are its output
    layer = model.model.layers[2]
    values = out.past_key_values.layers[2].values.repeat_interleave(2, dim=1)
    mixed = (out.attentions[2] @ values).transpose(1, 2).flatten(2)
    after = out.hidden_states[2] + layer.self_attn.o_proj(mixed)
    after = after + layer.mlp(layer.post_attention_layernorm(after))
    torch.testing.assert_close(after, out.hidden_states[3])
    assert model(ids).gates is None
    logits, cache = model(ids, return_dict=False)
    torch.testing.assert_close(logits, out.logits)
    assert cache.get_seq_length() == 13
    model.config.output_hidden_states = model.config.output_attentions = True
    configured = model(ids)
    for ours, theirs in zip(configured.hidden_states, out.hidden_states, strict=True):
        assert torch.equal(ours, theirs)
    assert len(configured.attentions) == 4
    model.config.output_hidden_states = model.config.output_attentions = False
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], logits)
    assert torch.equal(model.lm_head(model.model(ids)[0]), logits)
    model.config.return_dict = True
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, out.logits)


def test_attention_is_dispatched():
    """A registered kernel gets what flash and vLLM's need: heads apart, positions, no mask."""
    _, model = build_pair()
    ids, seen = random_ids(), []

    def kernel(module, q, k, v, mask, scaling, **kwargs):
        seen.append((module.layer_idx, mask, module.is_causal, kwargs["from_the_caller"]))
        assert kwargs["position_ids"].tolist() == [list(range(13))]
        assert q.shape == (2, 4, 13, 6)
        assert k.shape == v.shape == (2, 2, 13, 6)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    expected = model(ids).logits
    AttentionInterface.register("recording", kernel)
    model.set_attn_implementation("recording")
    out = model(ids, use_cache=False, from_the_caller="instances").logits
    torch.testing.assert_close(out, expected)
    assert seen == [(n, None, True, "instances") for n in range(4)]


@pytest.mark.parametrize("padded", [False, True])
def test_flex_attention(padded):
    _, model = build_pair()
    ids, mask = random_ids(), torch.ones(2, 13, dtype=torch.long)
    mask[0, :4] = 1 - padded
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("flex_attention")
    # compiled, its kernel takes half a minute; the CPU has none backwards
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        out = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(out[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)


def test_cache_holds_mixed_values():
    """The cache is a plain one: keys and V', nothing else, and layer 1's entry is V1."""
    _, model = build_pair(value_gate="identity")
    ids = random_ids(1, 6)
    cache = model(ids, use_cache=True).past_key_values
    v1 = cache.layers[0].values
    layer = model.model.layers[0]
    x = layer.input_layernorm(model.model.embed_tokens(ids))
    raw = layer.self_attn.v_proj(x).view(1, 6, 2, 6).transpose(1, 2)
    torch.testing.assert_close(v1, raw)
    assert len(cache.layers) == 4


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_checkpointing(architecture, reentrant):
    _, model = build_pair(architecture=architecture)
    ids = random_ids()
    model.train()
    model(ids, labels=ids).loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # renamed in v6
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-5, atol=1e-7, msg=name)
    with pytest.raises(ValueError, match="past_key_values"):
        model(ids, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision(architecture, dtype, tmp_path):
    """Runs in one dtype throughout and stays near float32."""
    _, model = build_pair(architecture=architecture, scale=0.02)
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=dtype).eval()
    ids = random_ids()
    out = half(ids, use_cache=True)
    assert out.logits.dtype == dtype
    assert {layer.values.dtype for layer in out.past_key_values.layers} == {dtype}
    assert {p.dtype for p in half.parameters()} == {dtype}  # FSDP2 refuses a layer of two
    torch.testing.assert_close(out.logits.float(), model(ids).logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_new_model_is_initialised(architecture):
    """As the twin is: norms 1, biases 0, scalars their own, matrices 0 or of one deviation."""
    model = model_class(architecture)(config_class(architecture)(**SHAPE))
    twin = dict(build_twin(architecture, **SHAPE, scale=0.0).named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(twin[name].std().item(), rel=0.5), name
        elif parameter.dim() == 3:  # of heads, layers and heads: uniform, but for the own layer
            bound = (3 / parameter[0].numel()) ** 0.5
            assert torch.equal(parameter[:, -1], torch.eye(len(parameter))), name
            assert 0.2 * bound < parameter[:, :-1].abs().mean() < 0.8 * bound, name
            assert parameter[:, :-1].abs().max() <= bound, name
        else:
            assert torch.equal(parameter, twin[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_resize_token_embeddings(tied, tmp_path):
    _, model = build_pair(tie_word_embeddings=tied)
    ids = random_ids()
    before = model(ids).logits
    model.resize_token_embeddings(80)
    after = model(ids, labels=ids)
    assert after.logits.shape[-1] == model.config.vocab_size == 80
    torch.testing.assert_close(after.logits[..., :67], before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, after.logits)


def test_parallel_plan_names_modules():
    """Every rule meets a module of each mixing layer; there is no plan for pipeline stages."""
    _, model = build_pair()
    names = [name for name, _ in model.model.named_modules()]
    for rule in model.config.base_model_tp_plan:
        met = fnmatch.filter(names, rule)
        assert len(met) == (3 if rule.endswith("value_gate") else 4), rule
    linears = {n for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)}
    plan = model.config.base_model_tp_plan
    ruled = {n for rule in plan for n in fnmatch.filter(names, rule)}
    assert linears <= ruled
    assert model.config.base_model_pp_plan is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"value_gate": "other"}, "value_gate"),
        ({"value_residual_last_k": 4}, "value_residual_last_k"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ],
)
def test_bad_config(options, words):
    with pytest.raises(ValueError, match=words):
        config_class("satformer")(**{**SHAPE, **options})


LOAD_ALONE = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
for folder in sys.argv[1:]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    case = torch.load(folder + "/case.pt")
    logits = model(case["ids"]).logits
    assert torch.equal(logits, case["logits"]), (logits - case["logits"]).abs().max()
    hidden = base(case["ids"]).last_hidden_state
    assert torch.equal(model.lm_head(hidden), case["logits"])
    model.save_pretrained(folder + "/again")
    again = AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True).eval()
    assert torch.equal(again(case["ids"]).logits, case["logits"])
assert not {name.split(".")[0] for name in sys.modules} & {"megatron_satformer", "megatron"}
"""


def test_exported_folder_loads_alone(tmp_path):
    """It works elsewhere, without this package, and so does what save_pretrained makes of it."""
    folders = []
    for architecture in ARCHITECTURES:
        reference, model = build_pair(architecture=architecture)
        folder = save_exported(reference, tmp_path / architecture, max_position_embeddings=256)
        ids = random_ids()
        torch.save({"ids": ids, "logits": model(ids).logits.detach()}, folder / "case.pt")
        folders.append(str(folder))
    run = subprocess.run(
        [sys.executable, "-c", "import torch; torch.set_num_threads(1)" + LOAD_ALONE, *folders],
        cwd=tmp_path,
        env={
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "1",
            "PATH": "",
            # `make test-oldest` names another transformers there
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
