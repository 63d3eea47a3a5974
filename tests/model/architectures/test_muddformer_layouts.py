"""MUDDFormer in others' layouts: their mathematics in plain torch, every bit there and back."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from megatron_satformer.checkpoint.convert.paper_layout import convert_from_paper, convert_to_paper
from megatron_satformer.checkpoint.hugging_face.code import model_class
from tests.checkpoint.checkpoints import build_reference
from tests.checkpoint.convert.test_paper_layout import norm, rotate, same_bits
from tests.checkpoint.convert.test_to_hf import load_tool, run_tool
from tests.models import save_exported

H, HN, VOCABULARY, LAYERS = 24, 6, 50, 4
BASELINE = {
    "model_type": "muddformer",
    "architectures": ["MUDDFormerForCausalLM"],
    "hidden_size": H,
    "num_hidden_layers": LAYERS,
    "num_heads": 4,
    "num_kv_heads": None,
    "intermediate_size": 512,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "qk_norm": True,
    "tie_word_embeddings": False,
    "num_ways": 4,
    "param_realloc": True,
    "use_pre_post_da_norm": True,
    "fuse_norm": True,
    "torch_dtype": "float32",
}
RELEASED = {
    "model_type": "muddformer",
    "architectures": ["MUDDFormer"],
    "auto_map": {"AutoModelForCausalLM": "modeling_muddformer.MUDDFormer"},
    "dim": H,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_local_heads": -1,
    "intermediate_size": 512,
    "vocab_size": VOCABULARY,
    "block_size": 64,
    "use_qk_norm": True,
    "norm_eps": 1e-6,
    "rope_base": 10000,
    "dense": True,
    "dense_type": "qkvr",
    "dynamic_dense": True,
    "expand_last": True,
    "round64": True,
    "sepln": True,
    "stack_hidden": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
DERIVED = {"intermediate_size": None, "hidden_ratio": 20, "tie_word_embeddings": True}
PLAIN = {
    "use_pre_post_da_norm": False,
    "param_realloc": False,
    "num_kv_heads": 2,
    "qk_norm": False,
}
EQUATION = {"round64": False, "expand_last": False, "n_local_heads": 2, "use_qk_norm": False}
DEEP = {"n_layer": 16, "intermediate_size": 256, "use_qk_norm": False, "norm_eps": 1e-5}
GROWN = [256, 384, 640, 768]
# configuration, what of it is another, widths of MLPs, and of W1 where not the equation's
CASES = {
    "baseline": (BASELINE, {}, [256, 512, 512, 768], []),
    "baseline, between two multiples": (
        BASELINE,
        {"num_hidden_layers": 5},
        [256, 256, 512, 512, 768],  # the second of 384
        [],
    ),
    "baseline, plain sums": (BASELINE, PLAIN, [512] * 4, []),
    # of 320, which becomes 256: 128, 213, 299 and 384
    "baseline, derived width": (BASELINE, DERIVED, [256, 256, 256, 256], []),
    "released": (RELEASED, {}, GROWN, [64] * 4),
    "released, as in its equation": (RELEASED, EQUATION, GROWN, []),
    "released, deep": (
        RELEASED,
        DEEP,
        [128] * 4 + [256] * 8 + [384] * 4,
        [64] * 14 + [128, 128],  # of 4 x 16, and of 4 x 17 behind the last layer
    ),
}
# names of what this file calls "embed", "0.q" and so on
BASELINE_NAMES = {
    "embed": "model.embeddings.weight",
    "head": "lm_head.weight",
    "norm": "model.norm.weight",
    **{f"norm_{way}": f"model.layers.N.attn_norm_{way}.weight" for way in "qkv"},
    **{way: f"model.layers.N.attn.{way}_proj.weight" for way in "qkvo"},
    "q_norm": "model.layers.N.attn.q_norm.weight",
    "k_norm": "model.layers.N.attn.k_norm.weight",
    "mlp_norm": "model.layers.N.mlp_norm.weight",
    **{name: f"model.layers.N.mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
    "w1": "model.layers.N.da.w1.weight",
    "w2": "model.layers.N.da.w2.weight",
    "static": "model.layers.N.da.static_weight",
    **{f"pre_{j}": f"model.layers.N.da.pre_da_norms.{j}.weight" for j in range(6)},
    **{f"post_{c}": f"model.layers.N.da.post_da_norms.{c}.weight" for c in range(4)},
}
RELEASED_NAMES = {
    "embed": "tok_embeddings.weight",
    "head": "output.weight",
    "norm": "norm.weight",
    **{f"norm_{way}": f"layers.N.attention_norms.{i}.weight" for i, way in enumerate("qkv")},
    **{way: f"layers.N.attention.w{way}.weight" for way in "qkvo"},
    "q_norm": "layers.N.attention.q_norm.weight",
    "k_norm": "layers.N.attention.k_norm.weight",
    "mlp_norm": "layers.N.ffn_norm.weight",
    "gate": "layers.N.feed_forward.w1.weight",
    "up": "layers.N.feed_forward.w3.weight",
    "down": "layers.N.feed_forward.w2.weight",
    "w1": "dynamic_dense.N.w1.weight",
    "w2": "dynamic_dense.N.w2.weight",
    "static": "dense_bs.N",
}


def spell(state: dict[str, torch.Tensor], released: bool) -> dict[str, torch.Tensor]:
    """The tensors under one repository's names."""
    found = {}
    for key, tensor in state.items():
        n, _, name = key.rpartition(".")
        theirs = (RELEASED_NAMES if released else BASELINE_NAMES)[name].replace("N", n)
        if released and n == "0":
            theirs = theirs.replace("attention_norms.0", "attention_norm")
        found[theirs] = tensor
    return found


def build_state(
    content: dict, widths: list[int], hidden: list[int], groups: int
) -> dict[str, torch.Tensor]:
    """Tensors, one by one, none as a model starts."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape, around=0.0, std=0.3):
        return torch.randn(*shape, generator=generator) * std + around

    released, layers = "dim" in content, len(widths)
    state = {"embed": normal(VOCABULARY, H, std=1.0), "norm": normal(H, around=1.0)}
    if not content["tie_word_embeddings"]:
        state["head"] = normal(VOCABULARY, H)
    for n, width in enumerate(widths):
        sources, ways = n + 2, 1 if n == layers - 1 else 4
        gains = ["norm_q", "mlp_norm"]
        gains += [] if released and n == 0 else ["norm_k", "norm_v"]
        if content.get("use_pre_post_da_norm"):
            gains += [f"pre_{j}" for j in range(sources)] + [f"post_{c}" for c in range(ways)]
        layer = {name: normal(H, around=1.0) for name in gains}
        # so small that the epsilon of the norm behind it shows
        layer["q"], layer["k"] = normal(H, H, std=1e-3), normal(groups * HN, H, std=1e-3)
        layer["v"], layer["o"] = normal(groups * HN, H), normal(H, H)
        if content["use_qk_norm" if released else "qk_norm"]:
            layer |= {name: normal(HN, around=1.0) for name in ("q_norm", "k_norm")}
        layer["gate"], layer["up"] = normal(width, H, std=0.1), normal(width, H, std=0.1)
        layer["down"] = normal(H, width, std=0.1)
        inner = hidden[n] if hidden else ways * sources
        layer["w1"], layer["w2"] = normal(inner, H), normal(ways * sources, inner, std=0.1)
        layer["static"] = normal(ways, sources)
        state |= {f"{n}.{name}": tensor for name, tensor in layer.items()}
    return state


def compute_logits(state: dict, eps: float, qk_eps: float, ids: torch.Tensor) -> torch.Tensor:
    """Ids [s] -> logits [s, vocab], as both repositories compute them."""
    x = state["embed"][ids]
    read, outputs = [x] * 4, [x]
    for n in range(1 + max(int(key.split(".")[0]) for key in state if "." in key)):
        p = {key.removeprefix(f"{n}."): t for key, t in state.items() if key.startswith(f"{n}.")}
        gains = [p.get(f"norm_{way}", p["norm_q"]) for way in "qkv"]
        inputs = [norm(y, gain, eps) for y, gain in zip(read, gains, strict=False)]
        q, k, v = (
            (y @ p[way].T).view(len(ids), -1, HN) for y, way in zip(inputs, "qkv", strict=True)
        )
        if "q_norm" in p:
            q, k = norm(q, p["q_norm"], qk_eps), norm(k, p["k_norm"], qk_eps)
        k, v = (y.repeat_interleave(4 // y.size(1), dim=1) for y in (rotate(k), v))
        scores = torch.einsum("shd,thd->hst", rotate(q), k) / HN**0.5
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
        out = torch.einsum("hst,thd->shd", scores.softmax(-1), v).flatten(1)
        x = read[-1] + out @ p["o"].T
        y = norm(x, p["mlp_norm"], eps)
        x = x + (F.silu(y @ p["gate"].T) * (y @ p["up"].T)) @ p["down"].T
        outputs.append(x)
        weights = F.gelu(norm(x, torch.ones(H), eps) @ p["w1"].T) @ p["w2"].T
        weights = weights.unflatten(-1, p["static"].shape) + p["static"]  # [s, C, n + 2]
        sources = outputs
        if "pre_0" in p:
            sources = [norm(y, p[f"pre_{j}"], eps) for j, y in enumerate(outputs)]
        read = list(torch.einsum("scj,jsh->csh", weights, torch.stack(sources)))
        if "post_0" in p:
            read = [norm(y, p[f"post_{c}"], eps) + x for c, y in enumerate(read)]
    return norm(read[0], state["norm"], eps) @ state.get("head", state["embed"]).T


def write(folder, case: str, file: str = "model.safetensors", drop=(), **more):
    """A folder in one of the layouts; returns its configuration, and tensors under both names."""
    base, options, widths, hidden = CASES[case]
    content = {name: value for name, value in (base | options | more).items() if name not in drop}
    groups = (content.get("n_local_heads") or content.get("num_kv_heads")) or 4
    state = build_state(content, widths, hidden, 4 if groups == -1 else groups)
    spelled = spell(state, "dim" in content)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content, indent=2))
    if file.endswith(".bin"):
        torch.save(spelled, folder / file)
    else:
        save_file(spelled, folder / file, {"format": "pt"})
    return content, state, spelled


@pytest.mark.parametrize("case", CASES)
def test_same_logits_and_every_bit_back(tmp_path, case):
    content, state, spelled = write(tmp_path / "theirs", case)
    convert_from_paper(tmp_path / "theirs", tmp_path / "hf")
    model = model_class("muddformer").from_pretrained(tmp_path / "hf", dtype="auto").eval()
    ids = torch.randint(VOCABULARY, (21,), generator=torch.Generator().manual_seed(1))
    eps = content.get("norm_eps", 1e-6)
    expected = compute_logits(state, eps, eps if "dim" in content else 1e-5, ids)
    with torch.no_grad():
        actual = model(ids[None]).logits[0]
    assert expected.std() > 0.5
    rounding = 5e-6 * len(CASES[case][2])  # adds up over layers
    largest = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=rounding * largest)

    convert_to_paper(tmp_path / "hf", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == content
    same_bits(load_file(tmp_path / "back" / "model.safetensors"), spelled)


def test_a_release_of_torch_becomes_a_start_of_training(tmp_path):
    """By the tool, whatever its configuration leaves out; from-hf takes what from-paper wrote."""
    drop = ("rope_base", "n_local_heads", "dense", "dense_type", "dynamic_dense", "sepln")
    content, _, spelled = write(tmp_path / "theirs", "released", "pytorch_model.bin", drop)
    tool = load_tool("convert_checkpoint")
    for command, load, save in (("from-paper", "theirs", "hf"), ("from-hf", "hf", "start")):
        flags = ["--load", str(tmp_path / load), "--save", str(tmp_path / save)]
        code, out, err = run_tool(tool, [command, *flags])
        assert (code, err) == (0, "")
    for flag in ("--architecture muddformer", "--mudd-form released", "--mudd-ffn-realloc"):
        assert flag in " ".join(out.replace("\\", " ").split())
    given = ["--load", str(tmp_path / "theirs"), "--save", str(tmp_path / "other")]
    code, _, err = run_tool(tool, ["from-hf", *given])
    assert code == 2
    assert "Convert it with from-paper first" in err
    convert_to_paper(tmp_path / "hf", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == content
    same_bits(load_file(tmp_path / "back" / "model.safetensors"), spelled)


def test_ours_in_the_form_of_the_release_is_one(tmp_path):
    """Without a configuration of theirs to go back to."""
    twin = build_reference(
        architecture="muddformer",
        mudd_form="released",
        mudd_ffn_realloc=True,
        tie_word_embeddings=False,
    )
    save_exported(twin, tmp_path / "hf")
    convert_to_paper(tmp_path / "hf", tmp_path / "theirs")
    content = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert content["architectures"] == ["MUDDFormer"]
    assert (content["round64"], content["expand_last"], content["sepln"]) == (True, True, True)
    convert_from_paper(tmp_path / "theirs", tmp_path / "back")
    same_bits(*(load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back")))


REFUSED = {
    "expand_last (False)": ("released", {"expand_last": False}),
    "dense_type (l)": ("released", {"dense_type": "l"}),
    "dense (False)": ("released", {"dense": False}),
    "sepln (False)": ("released", {"sepln": False}),
    "tie_word_embeddings (True) must be False": ("released", {"tie_word_embeddings": True}),
    "dim (25) of": ("released", {"dim": 25}),
    "num_hidden_layers (1) must be at least 2": ("released", {"n_layer": 1}),
    "num_ways (3)": ("baseline", {"num_ways": 3}),
    "model_type (muddpythia)": ("released", {"model_type": "muddpythia"}),
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_ours_does_not_compute_is_refused(tmp_path, told):
    case, options = REFUSED[told]
    content = CASES[case][0] | options
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(content))
    save_file({"a": torch.zeros(1)}, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(told)):
        convert_from_paper(tmp_path / "theirs", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_wrong_keys_are_listed_in_their_names(tmp_path):
    _, _, spelled = write(tmp_path / "theirs", "released")
    del spelled["dynamic_dense.2.w2.weight"]
    spelled["layers.0.attention_norms.1.weight"] = torch.zeros(H)
    spelled["dense_bs.3"] = torch.zeros(4, 5)
    save_file(spelled, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(ValueError, match="does not hold the tensors of this muddformer") as error:
        convert_from_paper(tmp_path / "theirs", tmp_path / "hf")
    for told in (
        "dynamic_dense.2.w2.weight is missing",
        "layers.0.attention_norms.1.weight is not known",
        "dense_bs.3 is (4, 5), not (1, 5)",
    ):
        assert told in str(error.value)


def test_gains_that_become_one_tensor_have_one_dtype(tmp_path):
    _, _, spelled = write(tmp_path / "theirs", "baseline")
    name = "model.layers.1.da.pre_da_norms.2.weight"
    spelled[name] = spelled[name].half()
    save_file(spelled, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(ValueError, match=r"pre_da_norms\.0.* must be of one dtype, not of"):
        convert_from_paper(tmp_path / "theirs", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_ours_that_neither_repository_has_is_refused(tmp_path):
    save_exported(build_reference(architecture="muddformer"), tmp_path / "hf")
    baseline = r"mudd_form \(paper\) must be baseline: .*"
    released = (
        r"its authors' repository \(arXiv 2502\.12170\): mudd_ffn_realloc \(False\) must be True"
    )
    with pytest.raises(ValueError, match=baseline + released):
        convert_to_paper(tmp_path / "hf", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
