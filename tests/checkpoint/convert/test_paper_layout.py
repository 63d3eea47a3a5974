"""The paper's own layout: its maths restated in plain torch, and every bit there and back."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from megatron_satformer.checkpoint.convert.paper_layout import (
    convert_from_paper,
    convert_to_paper,
)
from megatron_satformer.checkpoint.hugging_face.code import config_class, model_class
from megatron_satformer.model.architectures import TABLE, find_architecture
from tests.checkpoint.checkpoints import build_reference
from tests.checkpoint.convert.cases import rewrite_as_before
from tests.checkpoint.convert.test_to_hf import load_tool, run_tool
from tests.models import save_exported

CASES = {
    "satformer": {"model_type": "SATFormer"},
    "satformer, everything": {
        "model_type": "SATFormer",
        "num_kv_heads": 2,
        "qkv_bias": True,
        "tie_word_embeddings": False,
        "value_residual_gate": "softmax_sigmoid",
        "value_residual_proj_bias": True,
        "value_residual_last_k": 1,
    },
    "satformer, derived width": {
        "model_type": "SATFormer",
        "intermediate_size": None,
        "value_residual_gate": "tanh",
    },
    "resformer": {"model_type": "ResFormer", "num_kv_heads": 1, "value_residual_lambda2_init": 0.5},
    "transformer": {"model_type": "transformer", "qk_norm": False, "norm_eps": 1e-5},
    "denseformer": {"model_type": "denseformer"},
    "denseformer, 2 x 2": {
        "model_type": "denseformer",
        "num_kv_heads": 2,
        "tie_word_embeddings": False,
        "num_hidden_layers": 5,
        "dwa_dilation": 2,
        "dwa_period": 2,
    },
    "without residual": {"model_type": "SATFormer", "use_value_residual": False},
    "streams": {"model_type": "dhc", "use_dynamic_hc": False, "expansion_rate": 3},
    "streams, per token": {"model_type": "dhc", "expansion_rate": 4},
    "streams, without tanh": {
        "model_type": "dhc",
        "expansion_rate": 2,
        "use_tanh": False,
        "tie_word_embeddings": False,
    },
}
# Options of ours with which a model is theirs too.
EXACT = {
    "hyperconnections": {"hc_form": "baseline"},
    "muddformer": {"mudd_form": "baseline", "mudd_prepost_norm": True},
    "attnres": {"attnres_block_layers": 2},
}
THEIRS = [name for name in TABLE if find_architecture(name).paper]
# of those that once had one class, the keys of their own in their config.json
THEIR_OPTIONS = {
    "transformer": set(),
    "resformer": {"use_value_residual", "value_residual_last_k"},
    "satformer": {
        *("use_value_residual", "value_residual_gate"),
        *("value_residual_proj_bias", "value_residual_last_k"),
    },
}
SHAPE = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_heads": 4,
    "num_kv_heads": None,
    "intermediate_size": 40,
    "hidden_ratio": 4,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "qk_norm": True,
    "tie_word_embeddings": True,
    "fuse_norm": True,
    "torch_dtype": "float32",
    "transformers_version": "4.53.0",
}


def build_state(config: dict) -> dict[str, torch.Tensor]:
    """A model's tensors under the names of the paper's repository, written out one by one."""
    h, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_heads"]
    hn, groups = h // heads, config["num_kv_heads"] or heads
    ffn = config["intermediate_size"] or 256
    generator = torch.Generator().manual_seed(3)

    def normal(*shape, around=0.0, std=0.3):
        return torch.randn(*shape, generator=generator) * std + around

    # where nothing else is read from them, so small that epsilons show
    std = 1.0 if config["tie_word_embeddings"] else 1e-3
    state = {"model.embeddings.weight": normal(config["vocab_size"], h, std=std)}
    mixing = range(1, layers) if config.get("use_value_residual", True) else range(0)
    if config.get("value_residual_last_k"):
        mixing = range(layers - config["value_residual_last_k"], layers)
    for n in range(layers):
        attn, mlp = f"model.layers.{n}.attn", f"model.layers.{n}.mlp"
        state[f"model.layers.{n}.attn_norm.weight"] = normal(h, around=1.0)
        for name, rows in (("q", h), ("k", groups * hn), ("v", groups * hn)):
            # so small that the epsilon of the norm behind it shows
            std = 0.3 if name == "v" else 1e-3
            state[f"{attn}.{name}_proj.weight"] = normal(rows, h, std=std)
            if config.get("qkv_bias"):
                state[f"{attn}.{name}_proj.bias"] = normal(rows, std=std)
        state[f"{attn}.o_proj.weight"] = normal(h, h)
        if config["qk_norm"]:
            state[f"{attn}.q_norm.weight"] = normal(hn, around=1.0)
            state[f"{attn}.k_norm.weight"] = normal(hn, around=1.0)
        mixer = f"{attn}.value_residual_mixing"
        if n in mixing and config["model_type"] == "SATFormer":
            state[f"{mixer}.alpha_proj.weight"] = normal(groups, h)
            if config.get("value_residual_proj_bias"):
                state[f"{mixer}.alpha_proj.bias"] = normal(groups)
        if n in mixing and config["model_type"] == "ResFormer":
            state[f"{mixer}.lambda2"] = normal(1, around=0.5)[0]
        for kind in ("attn", "mlp") if config["model_type"] == "dhc" else ():
            streams = config.get("expansion_rate", 4)
            state[f"model.layers.{n}.{kind}_hc.static_beta"] = normal(streams, around=1.0)
            identity = torch.eye(streams, 1 + streams).roll(1, 1)
            connection = f"model.layers.{n}.{kind}_hc"
            state[f"{connection}.static_alpha"] = identity + normal(*identity.shape)
            if config.get("use_dynamic_hc", True):
                state[f"{connection}.norm.weight"] = normal(h, around=1.0)
                state[f"{connection}.dynamic_beta_proj"] = normal(h)
                state[f"{connection}.dynamic_alpha_proj"] = normal(h, 1 + streams)
                state[f"{connection}.dynamic_beta_scale"] = normal(1, around=0.5)
                state[f"{connection}.dynamic_alpha_scale"] = normal(1, around=0.5)
        state[f"model.layers.{n}.mlp_norm.weight"] = normal(h, around=1.0)
        state[f"{mlp}.gate_proj.weight"] = normal(ffn, h)
        state[f"{mlp}.up_proj.weight"] = normal(ffn, h)
        state[f"{mlp}.down_proj.weight"] = normal(h, ffn)
        if config["model_type"] == "denseformer" and (n + 1) % config.get("dwa_period", 1) == 0:
            count = (n + 1) // config.get("dwa_dilation", 1) + 1
            state[f"model.dwa_modules.alphas.{n}.weight"] = normal(1, count)
    state["model.norm.weight"] = normal(h, around=1.0)
    if config["model_type"] == "ResFormer":
        state["model.lambda_manager.lambda_scale"] = torch.tensor(2.7)
        state["model.lambda_manager.lambda_logits"] = normal(layers - 1)
    if not config["tie_word_embeddings"]:
        state["lm_head.weight"] = normal(config["vocab_size"], h)
    return state


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [s, heads, hn], base 1e4; the first half turns against the second."""
    s, _, hn = x.shape
    angles = torch.outer(torch.arange(s), 1e4 ** (-torch.arange(0, hn, 2) / hn))[:, None]
    one, two = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


GATES = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "softmax_sigmoid": lambda z: z.softmax(-1) * z.sigmoid() * z.size(-1),
}


def connect(
    p: dict, kind: str, streams: list[torch.Tensor], sublayer, tanh: bool
) -> list[torch.Tensor]:
    """Residual streams [s, h] after a sublayer, one or as many as a connection mixes."""
    if f"{kind}_hc.static_beta" not in p:
        return [x + sublayer(x) for x in streams]
    own = {k.split(f"{kind}_hc.")[1]: v for k, v in p.items() if f"{kind}_hc." in k}
    alphas, betas = [], []
    for j, x in enumerate(streams):
        alpha, beta = own["static_alpha"][j].expand(len(x), -1), own["static_beta"][j]
        if "norm.weight" in own:
            normed = norm(x, own["norm.weight"], torch.finfo(torch.float32).eps)
            more, most = normed @ own["dynamic_alpha_proj"], normed @ own["dynamic_beta_proj"]
            more, most = (more.tanh(), most.tanh()) if tanh else (more, most)
            alpha = alpha + own["dynamic_alpha_scale"] * more
            beta = beta + own["dynamic_beta_scale"] * most
        alphas.append(alpha)
        betas.append(beta.expand(len(x)))
    read, *kept = (
        sum(a[:, i, None] * x for a, x in zip(alphas, streams, strict=True))
        for i in range(1 + len(streams))
    )
    out = sublayer(read)
    return [b[:, None] * out + x for b, x in zip(betas, kept, strict=True)]


def paper_logits(state: dict, config: dict, ids: torch.Tensor) -> torch.Tensor:
    """Ids [s] -> logits [s, vocab], as the paper's repository computes them."""
    heads, eps = config["num_heads"], config.get("norm_eps", 1e-6)
    groups = config["num_kv_heads"] or heads
    gate, tanh = GATES[config.get("value_residual_gate", "relu")], config.get("use_tanh", True)
    x = state["model.embeddings.weight"][ids]
    streams, outputs = [x] * config.get("expansion_rate", 1), [x]
    carried: list[torch.Tensor] = []

    def attend(x: torch.Tensor, p: dict, n: int) -> torch.Tensor:
        normed = norm(x, p["attn_norm.weight"], eps)
        q, k, v = (
            F.linear(normed, p[f"attn.{name}_proj.weight"], p.get(f"attn.{name}_proj.bias"))
            for name in "qkv"
        )
        q, k, v = (y.view(len(ids), g, -1) for y, g in ((q, heads), (k, groups), (v, groups)))
        carried.append(v)
        v1 = carried[0]
        if "attn.value_residual_mixing.alpha_proj.weight" in p:
            mixer = "attn.value_residual_mixing.alpha_proj"
            alpha = gate(F.linear(normed, p[f"{mixer}.weight"], p.get(f"{mixer}.bias")))
            v = v + alpha[..., None] * v1
        elif "attn.value_residual_mixing.lambda2" in p:
            logits = state["model.lambda_manager.lambda_logits"]
            lambda1 = state["model.lambda_manager.lambda_scale"] * logits.softmax(0)[n - 1]
            v = lambda1 * v1 + p["attn.value_residual_mixing.lambda2"] * v
        if config["qk_norm"]:
            q, k = norm(q, p["attn.q_norm.weight"], 1e-5), norm(k, p["attn.k_norm.weight"], 1e-5)
        q, k = rotate(q), rotate(k)
        k, v = (y.repeat_interleave(heads // groups, dim=1) for y in (k, v))
        scores = torch.einsum("shd,thd->hst", q, k) / q.size(-1) ** 0.5
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
        out = torch.einsum("hst,thd->shd", scores.softmax(-1), v).flatten(1)
        return out @ p["attn.o_proj.weight"].T

    def feed(x: torch.Tensor, p: dict) -> torch.Tensor:
        normed = norm(x, p["mlp_norm.weight"], eps)
        up = F.silu(normed @ p["mlp.gate_proj.weight"].T) * (normed @ p["mlp.up_proj.weight"].T)
        return up @ p["mlp.down_proj.weight"].T

    for n in range(config["num_hidden_layers"]):
        p = {k.split(f"layers.{n}.")[1]: v for k, v in state.items() if f"layers.{n}." in k}
        streams = connect(p, "attn", streams, lambda x, p=p, n=n: attend(x, p, n), tanh)
        streams = connect(p, "mlp", streams, lambda x, p=p: feed(x, p), tanh)
        outputs.append(streams[0])
        if (alphas := state.get(f"model.dwa_modules.alphas.{n}.weight")) is not None:
            dilation = config.get("dwa_dilation", 1)
            group = outputs[(n + 1) % dilation :: dilation]
            streams = [sum(a * y for a, y in zip(alphas[0], group, strict=True))]
    x = sum(streams)
    x = norm(x, state["model.norm.weight"], eps)
    return x @ state.get("lm_head.weight", state["model.embeddings.weight"]).T


def write_paper(folder: Path, file: str = "model.safetensors", drop=(), add=None, **options):
    """A folder in the paper's layout; returns its config and its tensors."""
    config = SHAPE | options
    state = {k: v for k, v in (build_state(config) | (add or {})).items() if k not in drop}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if file.endswith(".bin"):
        torch.save(state, folder / file)
    else:
        save_file(state, folder / file, {"format": "pt"})
    return config, state


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[key].dtype, other[key].shape), key
        assert torch.equal(tensor, other[key]), key


@pytest.mark.parametrize("name", CASES)
def test_same_logits_and_every_bit_back(tmp_path, name):
    config, state = write_paper(tmp_path / "paper", **CASES[name])
    convert_from_paper(tmp_path / "paper", tmp_path / "hf")
    ours = json.loads((tmp_path / "hf" / "config.json").read_text())
    exported = model_class(ours["architecture"])
    model = exported.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    ids = torch.randint(50, (21,), generator=torch.Generator().manual_seed(1))
    expected = paper_logits(state, config, ids)
    with torch.no_grad():
        actual = model(ids[None]).logits[0]
    assert expected.std() > 0.5
    largest = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * largest)
    if config["qk_norm"]:  # the epsilon is not lost on the way
        model.config.qk_norm_eps = 1e-6
        other = exported(model.config).eval()
        other.load_state_dict(model.state_dict())
        assert (other(ids[None]).logits[0] - expected).abs().max() > 1e-3

    convert_to_paper(tmp_path / "hf", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    same_bits(load_file(tmp_path / "back" / "model.safetensors"), state)


@pytest.mark.parametrize("architecture", THEIRS)
def test_our_folder_there_and_back(tmp_path, architecture):
    """Mixed dtypes too: lambdas stay float32 in a bf16 model."""
    shape = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    options = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    options |= EXACT.get(architecture, {})
    config = config_class(architecture)(**shape, **options, qk_norm_eps=1e-5)
    model = model_class(architecture)(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lambda" in name:
            parameter.data = torch.rand(parameter.shape)
    model.save_pretrained(tmp_path / "hf")
    convert_to_paper(tmp_path / "hf", tmp_path / "paper")
    convert_from_paper(tmp_path / "paper", tmp_path / "back")
    files = [tmp_path / name / "model.safetensors" for name in ("hf", "back")]
    same_bits(*map(load_file, files))
    before, after = (config_class(architecture).from_pretrained(file.parent) for file in files)
    assert {**before.to_dict(), "auto_map": after.auto_map} == after.to_dict()


def test_another_architecture_is_refused(tmp_path):
    others = [name for name in TABLE if name not in THEIRS]
    assert others
    for name in others:
        save_exported(build_reference(architecture=name), tmp_path / name)
        with pytest.raises(ValueError, match=rf"architecture \({name}\) must be one of the paper"):
            convert_to_paper(tmp_path / name, tmp_path / "paper")
        assert not (tmp_path / "paper").exists()


def test_streams_with_another_norm_are_refused(tmp_path):
    save_exported(build_reference(architecture="hyperconnections"), tmp_path / "ours")
    told = r"cannot be converted: hc_form \(paper\) must be baseline: .* epsilon 1\.19e-07"
    with pytest.raises(ValueError, match=told):
        convert_to_paper(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(find_spec, ("fla", "einops"))), reason="flash-linear-attention is not installed"
)
@pytest.mark.parametrize("form", [{"attnres_block_layers": 2}, {"attnres_form": "full"}], ids=str)
def test_the_library_that_has_attention_residuals_computes_the_same(tmp_path, form):
    """flash-linear-attention loads what to-paper writes, and gives our logits."""
    twin = build_reference(architecture="attnres", num_hidden_layers=5, qk_norm=True, **form)
    save_exported(twin, tmp_path / "ours", qk_norm_eps=1e-5)
    convert_to_paper(tmp_path / "ours", tmp_path / "theirs")
    model = model_class("attnres").from_pretrained(tmp_path / "ours").eval()
    ids = torch.randint(twin.config.vocab_size, (2, 13))
    torch.save(ids, tmp_path / "ids")
    names = [tmp_path / name for name in ("theirs", "ids", "logits")]
    script = [sys.executable, Path(__file__).with_name("in_fla.py"), *names]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(ids).logits
    logits = torch.load(tmp_path / "logits")
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_blocks_that_end_inside_of_a_layer_are_refused(tmp_path):
    save_exported(build_reference(architecture="attnres"), tmp_path / "ours", qk_norm_eps=1e-5)
    convert_to_paper(tmp_path / "ours", tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    content = json.loads(file.read_text())
    assert content["attnres_block_size"] == 2  # of sublayers
    file.write_text(json.dumps(content | {"attnres_block_size": 3}))
    with pytest.raises(ValueError, match=r"attnres_block_size \(3\) of .* must be 1 or 2 or 4"):
        convert_from_paper(tmp_path / "theirs", tmp_path / "back")
    file.write_text(json.dumps(content | {"attnres_block_size": None}))  # no AttnRes at all
    with pytest.raises(ValueError, match=r"attn_res_norm.weight is not known"):
        convert_from_paper(tmp_path / "theirs", tmp_path / "back")


@pytest.mark.parametrize("architecture", THEIR_OPTIONS)
def test_a_folder_from_before_each_architecture_had_its_class(tmp_path, architecture):
    """Its model_type was satformer's and its config.json had every option, whatever it was."""
    twin = build_reference(architecture=architecture, attention_bias=True)
    save_exported(twin, tmp_path / "hf", qk_norm_eps=1e-5)
    convert_to_paper(tmp_path / "hf", tmp_path / "now")
    rewrite_as_before(tmp_path / "hf")
    convert_to_paper(tmp_path / "hf", tmp_path / "then")
    now, then = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("now", "then"))
    assert now == then
    assert then["model_type"] == find_architecture(architecture).paper[0].model_type
    assert {key for key in then if "value_residual" in key} == THEIR_OPTIONS[architecture]
    same_bits(*(load_file(tmp_path / f / "model.safetensors") for f in ("now", "then")))


def test_options_that_a_former_conversion_carried_are_still_read(tmp_path):
    """They were called reference_config."""
    config, state = write_paper(tmp_path / "paper", **CASES["resformer"])
    convert_from_paper(tmp_path / "paper", tmp_path / "hf")
    rewrite_as_before(tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    content = json.loads(file.read_text())
    content["reference_config"] = content.pop("paper_config")
    file.write_text(json.dumps(content))
    convert_to_paper(tmp_path / "hf", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    same_bits(load_file(tmp_path / "back" / "model.safetensors"), state)


@pytest.mark.parametrize(
    "commands", [("from-paper", "to-paper"), ("from-reference", "to-reference")]
)
def test_command_line(tmp_path, commands):
    """Under the former names too."""
    config, state = write_paper(tmp_path / "paper", **CASES["satformer, everything"])
    tool, places = load_tool("convert_checkpoint"), ("paper", "hf", "back")
    for command, load, save in zip(commands, places, places[1:], strict=False):
        flags = ["--load", str(tmp_path / load), "--save", str(tmp_path / save)]
        code, out, err = run_tool(tool, [command, *flags])
        assert (code, err) == (0, "")
        assert out.startswith(f"{tmp_path / save}: SATFormer, ")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    same_bits(load_file(tmp_path / "back" / "model.safetensors"), state)


def test_torch_file_with_tied_copy(tmp_path):
    embedding = build_state(SHAPE | {"model_type": "SATFormer"})["model.embeddings.weight"]
    tied = {"lm_head.weight": embedding}
    _, state = write_paper(
        tmp_path / "paper", "pytorch_model.bin", add=tied, model_type="SATFormer"
    )
    convert_from_paper(tmp_path / "paper", tmp_path / "hf")
    convert_to_paper(tmp_path / "hf", tmp_path / "back")
    del state["lm_head.weight"]  # written once
    same_bits(load_file(tmp_path / "back" / "model.safetensors"), state)

    write_paper(
        tmp_path / "other",
        add={"lm_head.weight": embedding + 1e-3},
        model_type="SATFormer",
    )
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        convert_from_paper(tmp_path / "other", tmp_path / "no")


def test_wrong_keys_are_listed(tmp_path):
    drop = ("model.layers.1.attn.value_residual_mixing.alpha_proj.weight", "model.norm.weight")
    add = {
        "model.layers.0.attn.value_residual_mixing.alpha_proj.weight": torch.zeros(4, 24),
        "model.layers.2.mlp.up_proj.weight": torch.zeros(41, 24),
    }
    write_paper(tmp_path / "paper", drop=drop, add=add, model_type="SATFormer")
    with pytest.raises(ValueError, match="does not hold the tensors") as error:
        convert_from_paper(tmp_path / "paper", tmp_path / "hf")
    for told in (
        *(f"{name} is missing" for name in drop),
        "model.layers.0.attn.value_residual_mixing.alpha_proj.weight is not known",
        "model.layers.2.mlp.up_proj.weight is (41, 24), not (40, 24)",
    ):
        assert told in str(error.value)
    assert not (tmp_path / "hf").exists()


REFUSED = {
    "model_type (gpt2)": {"model_type": "gpt2"},
    "window_size (8)": {"window_size": 8},
    "hidden_act (gelu)": {"hidden_act": "gelu"},
    "hidden_size (24) of": {"num_heads": 5},
    "hc_norm_type (layer)": {"model_type": "dhc", "hc_norm_type": "layer"},
    "num_ways (3)": {"model_type": "muddformer", "num_ways": 3},
    "value_residual_last_k (1) must be left out": {
        "model_type": "ResFormer",
        "value_residual_last_k": 1,
    },
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_ours_does_not_compute_is_refused(tmp_path, told):
    (tmp_path / "paper").mkdir()
    content = SHAPE | {"model_type": "SATFormer"} | REFUSED[told]
    (tmp_path / "paper" / "config.json").write_text(json.dumps(content))
    save_file({"a": torch.zeros(1)}, tmp_path / "paper" / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(told)):
        convert_from_paper(tmp_path / "paper", tmp_path / "hf")


def test_to_paper_refuses_what_the_paper_does_not_compute(tmp_path):
    shape = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    for name, architecture, options in (
        ("head_dim", "satformer", {"head_dim": 8, "qk_norm_eps": 1e-5}),
        ("value_residual_last_k", "resformer", {"value_residual_last_k": 1}),
        ("epsilon", "satformer", {}),
    ):
        config = config_class(architecture)(**shape, num_attention_heads=4, **options)
        model_class(architecture)(config).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=name):
            convert_to_paper(tmp_path / name, tmp_path / "paper")
    made = convert_to_paper(tmp_path / "epsilon", tmp_path / "paper", accept_qk_norm_eps=True)
    assert "which moves the logits" in str(made)
