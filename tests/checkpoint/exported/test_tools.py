"""The exported model under the tools people use: accelerate, torch.compile, PEFT, TP."""

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model

from tests.checkpoint.exported import fully_sharded
from tests.checkpoint.exported.test_modeling_decoder import (
    ARCHITECTURES,
    MIXING,
    build_pair,
    random_ids,
)
from tests.parallel.layouts import some_fast

GREEDY = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


@pytest.mark.parametrize("architecture", some_fast(ARCHITECTURES))
def test_layers_on_other_devices(architecture, tmp_path):
    """Layers on the disk, all of them held as meta tensors: what is carried follows the layer."""
    _, model = build_pair(architecture=architecture)
    ids = random_ids()
    expected, text = model(ids).logits, model.generate(ids, **GREEDY)
    places = {
        **dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"], "cpu"),
        **{f"model.layers.{n}": "disk" if n in (1, 3) else "cpu" for n in range(4)},
    }
    own = {name for name, _ in model.model.named_children()} - {"layers"}
    own -= {place.rpartition(".")[2] for place in places}
    places |= {f"model.{name}": "disk" for name in own}  # what belongs to the whole model
    on_disk = dispatch_model(
        copy.deepcopy(model), places, main_device="cpu", offload_dir=tmp_path / "disk"
    )
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    model.save_pretrained(tmp_path / "model")
    loaded = (
        type(model)
        .from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "other")
        .eval()
    )
    for moved in (on_disk, offloaded, loaded):
        assert moved.model.layers[3].self_attn.v_proj.weight.is_meta
        assert torch.equal(moved(ids).logits, expected)
        assert torch.equal(moved.generate(ids, **GREEDY), text)


@pytest.mark.parametrize("architecture", MIXING)
def test_what_is_carried_moves_with_the_layer(architecture):
    """The later layers run on another device, which refuses what was left on the CPU."""
    _, model = build_pair(architecture=architecture, tie_word_embeddings=False)
    for module in (*model.model.layers[2:], model.model.norm, model.lm_head):
        hook = AlignDevicesHook(execution_device="meta", skip_keys="past_key_values")
        add_hook_to_module(module.to("meta"), hook)
    out = model(random_ids(), output_gates=True)
    assert out.logits.shape == (2, 13, 67)
    assert out.logits.is_meta
    assert [alpha.is_meta for alpha in out.gates or ()] in ([], [False, True, True])
    cached = [layer.values.is_meta for layer in out.past_key_values.layers]
    assert cached == [False, False, True, True]
    x, v1 = torch.ones(2, 13, 24), torch.ones(2, 13, 2, 6)
    carried = (*(lambdas.to("meta") for lambdas in model.model.start(None)), v1)
    with pytest.raises(RuntimeError, match="device"):
        model.model.layers[3].self_attn.mix(x.to("meta"), v1.to("meta"), v1.to("meta"), carried)


def test_device_map_auto(tmp_path):
    """No layer is split: each is placed whole, wherever it fits."""
    _, model = build_pair(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model")
    of_layer = sum(p.numel() * 4 for p in model.model.layers[1].parameters())
    embeddings = model.lm_head.weight.numel() * 4
    loaded = (
        type(model)
        .from_pretrained(
            tmp_path / "model",
            device_map="auto",
            max_memory={"cpu": 2 * embeddings + 3 * of_layer},
            offload_folder=tmp_path / "offloaded",
        )
        .eval()
    )
    ids = random_ids()
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert {n.count(".") for n in loaded.hf_device_map if ".layers." in n} == {2}
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.slow
def test_compiles_without_graph_breaks(architecture):
    """One graph, forward and backward, with the cache it makes and the extra outputs.

    Their hooks are installed when they are first asked for, which cannot be compiled.
    """
    _, model = build_pair(architecture=architecture)
    ids = random_ids()
    expected = model(ids, labels=ids, output_gates=True, output_hidden_states=True)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    out = compiled(ids, labels=ids, output_gates=True, output_hidden_states=True)
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.gates, expected.gates)
    torch.testing.assert_close(out.hidden_states, expected.hidden_states)
    out.loss.backward()
    expected.loss.backward()
    for ours, (name, theirs) in zip(compiled.parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_generates_compiled_with_static_cache():
    _, model = build_pair(tie_word_embeddings=False, scale=0.8)
    ids = random_ids()
    expected = model.generate(ids, **GREEDY)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.equal(model.generate(ids, cache_implementation="static", **GREEDY), expected)


@pytest.mark.slow
def test_compiled_model_is_saved(tmp_path):
    """As vLLM's cache saves it: ahead of time, by pickle, its functions by their names."""
    model, options = build_pair()[1].model, {"use_cache": False, "return_dict": False}
    no_guards = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}  # vLLM has none
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True, options=no_guards)
    with torch.no_grad():
        compiled = compiled.aot_compile(((random_ids(),), options))
        compiled.save_compiled_function(str(tmp_path / "compiled"))
        with (tmp_path / "compiled").open("rb") as file:
            loaded = torch.compiler.load_compiled_function(file)
        ids = random_ids(seed=2)
        torch.testing.assert_close(loaded(model, ids, **options), model(ids, **options))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(checkpointing):
    """Adapters on q, v and gate: only they learn, the loss falls, merging keeps the logits."""
    _, model = build_pair(value_residual_last_k=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = random_ids()
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "value_gate"], task_type="CAUSAL_LM")
    tuned = get_peft_model(model, lora)
    for part, layers in (("q_proj", range(4)), ("v_proj", range(4)), ("value_gate", (2, 3))):
        found = {
            n.split(f".{part}.")[0] for n, _ in tuned.named_parameters() if f"{part}.lora" in n
        }
        assert found == {f"base_model.model.model.layers.{n}.self_attn" for n in layers}
    if checkpointing:
        tuned.gradient_checkpointing_enable()
        tuned.enable_input_require_grads()
    tuned.train()
    trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
    losses = []
    for _ in range(6):
        losses.append(tuned(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.95 * losses[0]
    assert all(p.any() for name, p in trained.items() if "lora_B" in name)
    tuned.eval()
    expected = tuned(input_ids=ids, output_gates=True)
    merged = tuned.merge_and_unload()
    out = merged(ids, output_gates=True)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.gates, expected.gates, rtol=1e-4, atol=1e-4)
    for name, parameter in merged.named_parameters():
        learned = any(part in name for part in lora.target_modules)
        assert torch.equal(parameter, before[name]) != learned, name


SPLIT = {
    "lime": "the router of a LIMe",
    "value_embeddings": "a table of value embeddings",
}


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        *((name, {}) for name in MIXING),
        pytest.param("satformer", {"value_gate": "lerp_channels"}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_tensor_parallel(architecture, options, on_ranks, tmp_path):
    """transformers' own tensor parallelism, by the plan in the configuration."""
    _, model = build_pair(architecture=architecture, vocab_size=68, **options)
    model.save_pretrained(tmp_path)
    ids = random_ids()
    model(ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    torch.save(
        (ids, model(ids).logits, model.generate(ids, **GREEDY), gradients), tmp_path / "case"
    )
    call = "tests.checkpoint.exported.tensor_parallel:check"
    trains = not hasattr(model.model, "value_residual")  # gradients of shared lambdas would halve
    on_ranks(2, call, str(tmp_path), architecture, GREEDY, trains)


@pytest.mark.parametrize(
    "architecture",
    ARCHITECTURES,
)
@pytest.mark.slow
def test_fully_sharded(architecture, on_ranks, tmp_path):
    """FSDP2, which wants one dtype in a layer: coefficients have that of the other weights."""
    _, model = build_pair(architecture=architecture, vocab_size=68, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    ids = random_ids()
    torch.save(ids, tmp_path / "ids")
    whole = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    losses = fully_sharded.train(whole, ids)
    assert losses[-1] < 0.9 * losses[0]
    on_ranks(2, f"{fully_sharded.__name__}:check", str(tmp_path), architecture, losses)


@pytest.mark.parametrize("architecture", SPLIT)
def test_tensor_parallel_is_refused_where_heads_are_mixed(architecture, on_ranks, tmp_path):
    """What reads, or holds, all KV heads, where each rank would have its own alone."""
    _, model = build_pair(architecture=architecture, vocab_size=68)
    model.save_pretrained(tmp_path)
    call = "tests.checkpoint.exported.tensor_parallel:check_refused"
    on_ranks(2, call, str(tmp_path), architecture, SPLIT[architecture])
