"""The exported models keep the conventions of transformers' own, which its tools rely on."""

import copy
import fnmatch
import re
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
)
from transformers.masking_utils import create_causal_mask
from transformers.utils import output_capturing

from megatron_satformer.checkpoint.exported.modeling_decoder import DecoderModel
from megatron_satformer.model.architectures import find_architecture
from tests.checkpoint.exported.test_modeling_decoder import (
    ARCHITECTURES,
    MIXING,
    build_pair,
    random_ids,
)
from tests.models import carries

EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)
GREEDY = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@EVERY
@pytest.mark.parametrize("depth", [1, 3])
def test_early_exit(architecture, depth):
    """The first layers draft, the model decides: its text is that without a draft."""
    _, model = build_pair(architecture=architecture, tie_word_embeddings=False, scale=0.8)
    ids = random_ids(1, 5)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, assistant_early_exit=depth, **GREEDY), expected)
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize(
    "options",
    [*({"architecture": a} for a in ARCHITECTURES)]
    + [{"architecture": a, "value_residual_last_k": 2} for a in MIXING],
    ids=lambda o: "-".join(map(str, o.values())),
)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_fewer_layers_mix_as_they_did(options, depth):
    """What mixes, and how, is a matter of the model that was built, not of where one leaves it."""
    _, model = build_pair(**options)
    ids, wanted = random_ids(), {"output_hidden_states": True, "output_gates": True}
    whole = model(ids, **wanted)
    model.config.num_hidden_layers = depth
    part = model(ids, **wanted)
    assert len(part.hidden_states) == depth + 1
    for ours, theirs in zip(part.hidden_states[:-1], whole.hidden_states, strict=False):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(part.gates, whole.gates, strict=False):
        assert torch.equal(ours, theirs)
    if type(model.model).finish is DecoderModel.finish:
        expected = model.lm_head(model.model.norm(whole.hidden_states[depth]))
        assert torch.equal(part.logits, expected)


@EVERY
def test_a_layer_alone(architecture):
    """As block-wise quantisation calls it: one message where it needs what others have made."""
    _, model = build_pair(architecture=architecture)
    ids = random_ids()
    x = model.model.embed_tokens(ids)
    positions = torch.arange(13)[None]
    given = {"position_embeddings": model.model.rotary_emb(x, positions)}
    out = model(ids, output_hidden_states=True)
    layer = model.model.layers[2]
    if any(carries(find_architecture(architecture))):
        with pytest.raises(ValueError, match=r"carried \(\d\) must be \d for layer 2, which cann"):
            layer(out.hidden_states[2], **given)
        return
    assert torch.equal(layer(out.hidden_states[2], **given)[0], out.hidden_states[3])


@EVERY
def test_layers_by_hand(architecture):
    """As that message says: each gets all that the one before returns behind its weights."""
    _, model = build_pair(architecture=architecture)
    ids = random_ids()
    decoder, states = model.model, model(ids, output_hidden_states=True).hidden_states
    x, carried = decoder.embed_tokens(ids), decoder.start(ids)
    given = {"position_embeddings": decoder.rotary_emb(x, torch.arange(13)[None])}
    for n, layer in enumerate(decoder.layers):
        assert torch.equal(x, states[n])
        x, _, _, *carried = layer(x, *carried, **given)
    assert torch.equal(decoder.norm(decoder.finish(x, tuple(carried))), states[-1])


@EVERY
def test_a_cache_that_is_given_but_not_wanted(architecture):
    """It is read and filled, as in transformers' models, and not returned."""
    _, model = build_pair(architecture=architecture)
    ids = random_ids()
    for decoder in (model, model.model):
        cache = DynamicCache(config=model.config)
        assert decoder(ids[:, :7], past_key_values=cache).past_key_values is cache
        out = decoder(ids[:, 7:], past_key_values=cache, use_cache=False)
        assert out.past_key_values is None
        assert cache.get_seq_length() == 13
        torch.testing.assert_close(out[0], decoder(ids)[0][:, 7:], rtol=1e-4, atol=1e-5)


@EVERY
def test_linears_are_torchs_own(architecture):
    """vLLM puts its own, in the model's dtype, in the place of those of any class."""
    _, model = build_pair(architecture=architecture)
    found = {type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    assert found == {torch.nn.Linear}


@pytest.mark.parametrize(
    "options",
    [*({"architecture": a} for a in ARCHITECTURES), {"value_gate": "lerp_channels"}],
    ids=lambda o: "-".join(o.values()),
)
def test_rules_of_the_plan_begin_no_other_name(options):
    """vLLM reads the rules of tensor parallelism as expressions that names begin with."""
    _, model = build_pair(**options)
    names = [n for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)]
    for rule in model.config.base_model_tp_plan:
        begun = [name for name in names if re.match(rule, name)]
        assert begun == fnmatch.filter(names, rule), rule


@pytest.mark.skipif(
    not hasattr(output_capturing, "selected_hidden_states"),
    reason="this transformers returns all hidden states",
)
@pytest.mark.parametrize("wanted", [[0, -1], 2, [1]], ids=str)
def test_some_hidden_states(wanted):
    _, model = build_pair()
    ids = random_ids()
    every = model(ids, output_hidden_states=True).hidden_states
    some = model(ids, output_hidden_states=wanted).hidden_states
    kept = {n % 5 for n in (wanted if isinstance(wanted, list) else [wanted])}
    assert [state is not None for state in some] == [n in kept for n in range(5)]
    assert all(torch.equal(some[n], every[n]) for n in kept)


def test_masks_made_before():
    """A dict of masks by the kind of layer, as transformers' models with several kinds take it."""
    _, model = build_pair()
    ids, mask = random_ids(), torch.ones(2, 13, dtype=torch.long)
    mask[0, :4] = 0
    made = create_causal_mask(
        config=model.config,
        inputs_embeds=model.model.embed_tokens(ids),
        attention_mask=mask,
        past_key_values=None,
        position_ids=torch.arange(13)[None],
    )
    expected = model(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, attention_mask={"full_attention": made}).logits, expected)
    assert not torch.equal(model(ids).logits, expected)


def test_weights_of_attention_need_eager():
    """As in transformers: others give none, and say so."""
    _, model = build_pair()
    ids = random_ids()
    assert model(ids, output_attentions=True).attentions == ()
    model.set_attn_implementation("eager")
    assert len(model(ids, output_attentions=True).attentions) == 4
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="eager"):
        model.config.output_attentions = True


@EVERY
def test_scores_of_labels(architecture, tmp_path):
    """Those of the last token that is no padding, from the decoder of a language model."""
    _, model = build_pair(architecture=architecture)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path)
    ids = random_ids()
    ids[0, 9:] = 0
    name = type(model).build_auto_map()["AutoModelForSequenceClassification"].rpartition(".")[2]
    scorer = getattr(sys.modules[type(model).__module__], name)
    scores = scorer.from_pretrained(tmp_path, num_labels=3).eval()
    hidden = model.model(ids).last_hidden_state
    out = scores(ids, labels=torch.tensor([0, 2]))
    expected = scores.score(torch.stack([hidden[0, 8], hidden[1, 12]]))
    torch.testing.assert_close(out.logits, expected, rtol=1e-5, atol=1e-6)
    out.loss.backward()
    assert all(p.grad is not None for p in scores.parameters())


@EVERY
def test_what_python_saves_is_found_by_every_auto_class(architecture, tmp_path, monkeypatch):
    """A model that was made here, not exported, and saved by transformers alone."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    _, model = build_pair(architecture=architecture)
    autos = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)
    for saved in (model, model.model, copy.deepcopy(model).bfloat16()):
        saved.save_pretrained(tmp_path / "model")
        names = set(saved.config.auto_map)
        assert names == {"AutoConfig", *(auto.__name__ for auto in autos)}
    model.save_pretrained(tmp_path / "model")
    ids = random_ids()
    for auto in autos:
        loaded = auto.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
        decoder = getattr(loaded, "model", loaded)
        assert torch.equal(decoder(ids)[0], model.model(ids)[0])
    config = AutoConfig.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert config.architectures == [type(model).__name__]
