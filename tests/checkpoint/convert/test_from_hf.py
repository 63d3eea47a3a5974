"""Hugging Face folders become checkpoints that Megatron continues at any layout, bit for bit."""

import gc
import json
import re
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from megatron_satformer.checkpoint.convert.from_hf import Import, import_from_hf
from megatron_satformer.checkpoint.convert.names import iterate_names
from megatron_satformer.checkpoint.convert.to_hf import export_to_hf
from megatron_satformer.checkpoint.hugging_face.code import config_class, model_class
from megatron_satformer.checkpoint.megatron import release
from megatron_satformer.checkpoint.megatron.reader import open_checkpoint
from megatron_satformer.checkpoint.megatron.release import Piece, write_release
from megatron_satformer.model.architectures import (
    PLAIN,
    TABLE,
    all_architectures,
    find_architecture,
)
from megatron_satformer.model.architectures.record import Architecture
from tests.checkpoint.checkpoints import (
    PADDED,
    VOCABULARY,
    build_args,
    build_reference,
    write_checkpoint,
)
from tests.checkpoint.convert.cases import build_cases, rewrite_as_before, stacked
from tests.checkpoint.convert.test_to_hf import load_tool, run_tool
from tests.models import save_exported
from tests.parallel.layouts import some_fast

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
READ = 100
DATA = f"--mock-data --tokenizer-type NullTokenizer --vocab-size {READ}".split()
IDS = torch.randint(3, READ, (2, 24), generator=torch.Generator().manual_seed(7))
SHAPE = {
    "vocab_size": READ,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-12,  # it sees by how much attnres divides what its norms read
    "bos_token_id": None,
    "eos_token_id": 2,
}
# as a folder of ours has a plain Transformer: with biases it is neither a Llama nor a Qwen3
CASES = build_cases(
    {"attention_bias": True, "head_dim": 6, "rms_norm_eps": 1e-5},
    {"attention_bias": True, "tie_word_embeddings": False, "qk_norm": False},
    {"value_residual_last_k": 1, "num_key_value_heads": 4},
    {"value_gate": "tanh", "value_gate_bias": True},
    {"mean_scale": 0.5},
    {"dwa_dilation": 2, "dwa_period": 3},
    {"mudd_prepost_norm": True, "mudd_ffn_realloc": True},
    {"mudd_form": "released"},
    {"mudd_form": "baseline", "mudd_ffn_realloc": True},
    {"hc_form": "baseline"},
    {"attnres_form": "full"},
    {"hc_streams": 2, "mhc_residual": "plain", "mhc_collapse": "head"},
)
STOCK = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_theta=5e5),
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=False, head_dim=6),
}


def why_not_from_zero(architecture: Architecture) -> str | None:
    """Why a plain Transformer cannot be imported as one; None: it can."""
    options = {**architecture.model_options, **architecture.start_options}
    return architecture.plain_start(SimpleNamespace(**options))


FROM_ZERO = [a.name for a in all_architectures() if why_not_from_zero(a) is None]
ADDING = [name for name in FROM_ZERO if name != PLAIN]


def save_model(model: torch.nn.Module, folder: Path, dtype=torch.float32, wide=()) -> Path:
    """Every number random, norms and scalars too; those of the names in `wide` stay float32."""
    generator = torch.Generator().manual_seed(5)
    model = model.to(dtype)
    for name, parameter in model.named_parameters():
        if name in wide:
            parameter.data = parameter.data.float()
        noise = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.data.add_(noise.to(parameter.dtype))
    model.save_pretrained(folder)
    return folder


def save_stock(kind: str, folder: Path, **changes) -> Path:
    config = type(STOCK[kind])(**{**STOCK[kind].to_dict(), **changes})
    return save_model(AutoModelForCausalLM.from_config(config), folder)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {key: checkpoint.read(key) for key in checkpoint.tensors}


def read_layers(folder: Path) -> dict[str, torch.Tensor]:
    """As `read_tensors`, every layer apart, also where layers are alike and stored in one."""
    apart: dict[str, torch.Tensor] = {}
    for key, tensor in read_tensors(folder).items():
        if key.startswith("decoder.layers.") and not key.split(".")[2].isdigit():
            name = key.removeprefix("decoder.layers.")
            apart |= {f"decoder.layers.{n}.{name}": layer for n, layer in enumerate(tensor)}
        else:
            apart[key] = tensor
    return apart


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype, key
        assert torch.equal(tensor, other[key]), key


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)],
    ids=["fp32", "bf16"],
)
@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_hugging_face_there_and_back(tmp_path, architecture, options, dtype):
    kind = config_class(architecture)
    config = kind(**{**SHAPE, **options})
    wide = {part for name in iterate_names(config) if name.fp32 for part in name.hf}
    save_model(model_class(architecture)(config), tmp_path / "hf", dtype, wide)
    made = import_from_hf(tmp_path / "hf", tmp_path / "megatron")
    export_to_hf(tmp_path / "megatron", tmp_path / "back")
    weights = [load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "back")]
    same_bits(*weights)
    assert f": {architecture} (model_type " in str(made)
    assert made.parameters == sum(tensor.numel() for tensor in weights[0].values())
    kept = {key: torch.float32 if key in wide else dtype for key in weights[0]}
    assert {key: tensor.dtype for key, tensor in weights[0].items()} == kept
    before, after = (kind.from_pretrained(tmp_path / f).to_dict() for f in ("hf", "back"))
    assert {**before, "auto_map": after["auto_map"]} == after


@pytest.mark.parametrize("kind", STOCK)
def test_stock_models_there_and_back(tmp_path, kind):
    save_stock(kind, tmp_path / "hf")
    import_from_hf(tmp_path / "hf", tmp_path / "megatron", dtype="fp32")
    export_to_hf(tmp_path / "megatron", tmp_path / "back")
    same_bits(*(load_file(tmp_path / f / "model.safetensors") for f in ("hf", "back")))
    before, after = (type(STOCK[kind]).from_pretrained(tmp_path / f) for f in ("hf", "back"))
    assert before.to_dict() == after.to_dict()


@pytest.mark.parametrize("architecture", TABLE)
def test_megatron_there_and_back(tmp_path, architecture):
    model = build_reference(architecture=architecture, num_key_value_heads=2)
    write_checkpoint(tmp_path / "one", model, stacked=stacked(architecture))
    export_to_hf(tmp_path / "one", tmp_path / "hf")
    import_from_hf(tmp_path / "hf", tmp_path / "two")
    one, two = (read_tensors(tmp_path / folder) for folder in ("one", "two"))
    for tensors in (one, two):
        for key in tensors:
            if tensors[key].size(0) == PADDED:
                # what the padding holds is lost; it repeats the last row
                assert torch.equal(two[key][VOCABULARY], two[key][VOCABULARY - 1])
                tensors[key] = tensors[key][:VOCABULARY]
    same_bits(one, two)
    args = vars(open_checkpoint(tmp_path / "two").args)
    for option, value in vars(build_args(model.config)).items():
        if option not in ("seq_length", "consumed_train_samples"):
            assert args[option] == value, option


@pytest.fixture
def run(on_ranks, tmp_path):
    """Runs training on so many ranks from an import; returns logits of IDS, [b, s, v/tp] each."""

    def start(ranks: int, made: Import, *flags: object) -> list[torch.Tensor]:
        torch.save(IDS, tmp_path / "ids")
        words = [*DATA, *(word for flag in made.flags for word in flag.split()), *map(str, flags)]
        files = str(tmp_path / "ids"), str(tmp_path / "logits")
        on_ranks(ranks, "tests.checkpoint.ranks:train", words, *files)
        return [torch.load(file) for file in sorted(tmp_path.glob("logits.[0-9]"))]

    return start


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A Qwen3 folder and its logits of IDS."""
    folder = save_stock("qwen3", tmp_path_factory.mktemp("qwen") / "hf")
    return folder, logits_of(folder)


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True
    )
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("architecture", some_fast(FROM_ZERO))
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("--tensor-model-parallel-size 2 --sequence-parallel", marks=pytest.mark.slow),
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ],
    ids=["TP2", "PP2 x 2 virtual"],
)
def test_megatron_computes_the_same(run, qwen, tmp_path, layout, architecture):
    """The flags that the import prints are those that the model needs."""
    folder, expected = qwen
    made = import_from_hf(
        folder,
        tmp_path / "megatron",
        architecture=architecture,
        tensor_model_parallel_size=2,
    )
    assert f": {architecture} (model_type " in str(made)
    assert f"--padded-vocab-size {2 * 128}" in made.flags
    start = ["--skip-train", "--pretrained-checkpoint", tmp_path / "megatron"]
    logits = run(2, made, *layout.split(), *start)
    actual = torch.cat(logits, dim=-1)[..., :READ]
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", some_fast(ADDING))
def test_the_start_computes_the_transformer_and_learns(run, qwen, tmp_path, architecture):
    folder, expected = qwen
    made = import_from_hf(folder, tmp_path / "start", architecture=architecture)
    assert f"NOTE: what a {architecture} adds to a Transformer changes nothing yet" in str(made)
    export_to_hf(tmp_path / "start", tmp_path / "hf")
    config = config_class(architecture).from_pretrained(tmp_path / "hf")
    for name, value in find_architecture(architecture).start_options.items():
        assert getattr(config, name) == value
        assert f"{name} ({value})" in made.notes[0]
    torch.testing.assert_close(logits_of(tmp_path / "hf"), expected, rtol=1e-5, atol=1e-5)
    stored = read_layers(tmp_path / "start")
    like = {name.hf[0]: name.megatron for name in iterate_names(config)}
    own = {
        t.megatron: t.start(t.shape) if t.like is None else stored[like[t.like]]
        for _, t in find_architecture(architecture).all_tensors(config)
    }
    assert own
    # beside rows that pad a vocabulary
    assert all(torch.equal(stored[key][: len(start)], start) for key, start in own.items())
    # a release is no finished run: --load goes on from it without --finetune too, and saves there
    run(1, made, "--load", tmp_path / "start", "--save", tmp_path / "start", "--train-iters", 4)
    assert open_checkpoint(tmp_path / "start").step == 4
    stored = read_layers(tmp_path / "start")
    # Without a gradient: one source, streams that are alike yet, streams of which a mean is read.
    still = (
        "decoder.layers.0.self_attention_res.",
        "decoder.layers.0.self_attention_hyper_connection.alpha_res",
        "decoder.layers.3.mlp_hyper_connection.alpha_res",
    )
    moved = {key: (stored[key][: len(start)] - start).abs() for key, start in own.items()}
    learnt = [tensor for key, tensor in moved.items() if not key.startswith(still)]
    assert all(tensor.any() for tensor in learnt)
    # the steps of a single number may undo each other
    assert all(tensor.max() > 1e-3 for tensor in learnt if tensor.numel() > 1)
    assert max(tensor.max() for tensor in learnt) > 1e-3
    # the run is not an import to be replaced
    with pytest.raises(ValueError, match="holds more than an earlier import"):
        import_from_hf(folder, tmp_path / "start", overwrite=True)


def test_gates_of_zero():
    """Every layer but the first has a gate that starts at zero, and tanh learns from there."""
    satformer = find_architecture("satformer")
    assert satformer.start_options == {"value_gate": "tanh"}
    config = config_class("satformer")(**SHAPE)
    own = [tensor.megatron for _, tensor in satformer.all_tensors(config)]
    assert own == [f"decoder.layers.{n}.self_attention.value_gate.weight" for n in (1, 2, 3)]


@pytest.mark.parametrize("architecture", [name for name in TABLE if name not in FROM_ZERO])
def test_what_cannot_start_from_zero_is_refused(qwen, tmp_path, architecture):
    told = why_not_from_zero(find_architecture(architecture))
    with pytest.raises(ValueError, match=rf"architecture \({architecture}\) cannot .*{told}"):
        import_from_hf(qwen[0], tmp_path / "megatron", architecture=architecture)
    assert not list(tmp_path.iterdir())


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


LINEAR_ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
REFUSED = {
    "model_type (gpt2)": {"model_type": "gpt2"},
    "model_type (SATFormer)": {"model_type": "SATFormer"},
    "hidden_act (gelu)": {"hidden_act": "gelu"},
    "use_sliding_window (True)": {"use_sliding_window": True, "layer_types": None},
    "quantization_config (": {"quantization_config": {"quant_method": "fp8"}},
    "rope_parameters ({'rope_type': 'linear'": {"rope_parameters": LINEAR_ROPE},
    "rope_theta (10000.5)": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.5}},
    "lm_head.weight is not model.embed": {"tie_word_embeddings": True},
    "model.layers.4.input_layernorm.weight is missing": {
        "num_hidden_layers": 5,
        "layer_types": None,
    },
    "model.embed_tokens.weight is (100, 32), not (101, 32)": {"vocab_size": 101},
    "cannot be read": {"hidden_size": "wide"},
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_megatron_does_not_compute_is_refused(qwen, tmp_path, told):
    folder = shutil.copytree(qwen[0], tmp_path / "hf")
    edit_config(folder, **REFUSED[told])
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        import_from_hf(folder, tmp_path / "megatron")
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]


def test_bias_of_the_output_projection(tmp_path):
    folder = save_stock("llama", tmp_path / "hf", attention_bias=True)
    with pytest.raises(ValueError, match=r"zeros in model.layers.0.self_attn.o_proj.bias"):
        import_from_hf(folder, tmp_path / "megatron")
    state = load_file(folder / "model.safetensors")
    for name in state:
        if name.endswith("o_proj.bias"):
            state[name].zero_()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")  # read as well
    import_from_hf(folder, tmp_path / "megatron")
    export_to_hf(tmp_path / "megatron", tmp_path / "back")
    torch.testing.assert_close(
        logits_of(tmp_path / "back"), logits_of(folder), rtol=1e-5, atol=1e-5
    )


def test_epsilon_and_options_that_cannot_be(qwen, tmp_path):
    config = config_class("satformer")(**SHAPE, qk_norm_eps=1e-5)
    model_class("satformer")(config).save_pretrained(tmp_path / "hf")
    start = partial(import_from_hf, tmp_path / "hf", tmp_path / "megatron")
    with pytest.raises(ValueError, match="Megatron has one epsilon"):
        start()
    assert "which moves the logits" in str(start(accept_qk_norm_eps=True))
    for options, told in (
        ({"architecture": "transformer"}, r"architecture \(transformer\) must be left out"),
        ({"options": {"value_gate": "tanh"}}, r"value_gate \(tanh\) must only be given with"),
        ({"make_vocab_size_divisible_by": 0}, r"divisible_by \(0\) must be at least 1"),
    ):
        with pytest.raises(ValueError, match=told):
            start(accept_qk_norm_eps=True, overwrite=True, **options)
    start = partial(import_from_hf, qwen[0], tmp_path / "other", architecture="satformer")
    for options, told in (
        ({"value_gate": "relu"}, r"with value_gate \(relu\) cannot .* would never open"),
        ({"value_gate": "sigmoid"}, r"with value_gate \(sigmoid\) cannot .* starts open"),
        ({"value_gate": "step"}, r"value_gate \(step\) must be one of"),
        ({"value_gate_init_std": 0.1}, r"value_gate_init_std \(0\.1\) must be left out"),
        ({"mean_scale": 2.0}, r"mean_scale \(2\.0\) must be left out"),
    ):
        with pytest.raises(ValueError, match=told):
            start(options=options)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match=r"architecture \(conformer\) must be one of"):
        import_from_hf(qwen[0], tmp_path / "other", architecture="conformer")


def test_command_line(qwen, tmp_path):
    """The architecture's own options follow as flags of their own."""
    tool = load_tool("convert_checkpoint")
    flags = ["from-hf", "--load", str(qwen[0]), "--save", str(tmp_path / "megatron")]
    own = ["--value-gate", "identity", "--value-gate-bias", "--value-residual-last-k", "2"]
    code, out, _ = run_tool(tool, [*flags, "--architecture", "satformer", *own])
    assert code == 0
    assert (
        "what a satformer adds to a Transformer changes nothing yet, value_residual_last_k (2)"
        in out
    )
    args = open_checkpoint(tmp_path / "megatron").args
    assert (args.architecture, args.value_gate) == ("satformer", "identity")
    assert (args.value_gate_bias, args.value_residual_last_k) == (True, 2)
    assert all(flag in out for flag in ("--value-gate identity", "--value-residual-last-k 2"))
    for wrong, told in (
        (["--value-gate", "identity"], "unrecognized arguments: --value-gate identity"),
        (["--architecture", "satformer", "--value-gate", "step"], "invalid choice: 'step'"),
        (["--architecture", "transformer", "--value-gate", "tanh"], "unrecognized arguments"),
        (["--architecture", "satformer", "--value-gat", "tanh"], "unrecognized arguments"),
        (["--architecture", "satformer", "--value-gate", "relu"], "would never open"),
        (["--architecture", "conformer"], "architecture (conformer) must be one of"),
    ):
        code, out, err = run_tool(tool, [*flags, "--overwrite", *wrong])
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: ")
        assert told in err
    assert open_checkpoint(tmp_path / "megatron").args.value_gate == "identity"


@pytest.mark.parametrize("architecture", TABLE)
def test_a_folder_from_before_each_architecture_had_its_class(tmp_path, architecture):
    """Its model_type was satformer's and its config.json had every option, whatever it was."""
    twin = build_reference(architecture=architecture, attention_bias=True)
    save_exported(twin, tmp_path / "hf", max_position_embeddings=64)
    import_from_hf(tmp_path / "hf", tmp_path / "now")
    rewrite_as_before(tmp_path / "hf")
    made = import_from_hf(tmp_path / "hf", tmp_path / "then")
    assert (made.architecture, made.source) == (architecture, "satformer")
    same_bits(*(read_tensors(tmp_path / name) for name in ("now", "then")))
    now, then = (open_checkpoint(tmp_path / name).args for name in ("now", "then"))
    assert now == then


def write_shards(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    places = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({n: state[n] for n in names if places[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_broken_folders_are_named(qwen, tmp_path):
    folder = write_shards(qwen[0], tmp_path / "hf")
    start = partial(import_from_hf, folder, tmp_path / "megatron")
    start()
    with pytest.raises(ValueError, match=r"exists already\. Pass --overwrite"):
        start()
    start = partial(start, overwrite=True)
    start()
    first, second, third = sorted(folder.glob("*.safetensors"))
    whole = second.read_bytes()
    second.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=f"{second.name} is cut short"):
        start()
    second.unlink()
    with pytest.raises(ValueError, match=f"{second.name} of its index is missing"):
        start()
    shutil.copy(third, second)
    with pytest.raises(ValueError, match=f"does not fit its index: .* not in {second.name}"):
        start()
    for file in (first, second, third, folder / "model.safetensors.index.json"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no model.safetensors nor pytorch_model.bin"):
        start()
    torch.save({"model.norm.weight": torch.ones(32)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight is missing"):
        start()
    torch.save([torch.ones(32)], folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"must hold a model's state dict"):
        start()
    (folder / "pytorch_model.bin").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"pytorch_model.bin is cut short"):
        start()
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        start()
    read_tensors(tmp_path / "megatron")  # the earlier import is still there


def test_torchs_own_shards(qwen, tmp_path):
    folder = write_shards(qwen[0], tmp_path / "hf")
    for file in sorted(folder.glob("*.safetensors")):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    index = folder / "model.safetensors.index.json"
    index.with_name("pytorch_model.bin.index.json").write_text(
        index.read_text().replace(".safetensors", ".bin")
    )
    index.unlink()
    import_from_hf(folder, tmp_path / "shards")
    import_from_hf(qwen[0], tmp_path / "whole")
    shards, whole = read_tensors(tmp_path / "shards"), read_tensors(tmp_path / "whole")
    assert shards.keys() == whole.keys()
    assert all(torch.equal(shards[name], whole[name]) for name in whole)


def test_a_weight_too_large_for_fp16(qwen, tmp_path):
    folder = shutil.copytree(qwen[0], tmp_path / "hf")
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].float()
    state["model.norm.weight"][3] = 7e4
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"dtype \(fp16\) must hold model.norm.weight"):
        import_from_hf(folder, tmp_path / "megatron", dtype="fp16")
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]


@pytest.mark.slow
def test_a_full_disk_is_one_line(qwen, tmp_path):
    """A limit on the size of a file stands for it."""
    tool = Path(__file__).resolve().parents[3] / "tools/convert_checkpoint.py"
    run = subprocess.run(
        # -B: Python 3.12.1 would leave compiled modules behind that are cut off as well
        [sys.executable, "-B", tool, "from-hf", "--load", qwen[0], "--save", tmp_path / "megatron"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert re.fullmatch(r"error: .*(File too large|disk is full).*", run.stderr.strip())
    assert not list(tmp_path.iterdir())


def test_memory_is_that_of_one_file(tmp_path, monkeypatch):
    """Neither the source's tensors nor the target's are ever in memory together."""
    monkeypatch.setattr(release, "FILE_SIZE", 1)
    alive: list[torch.Tensor] = []

    def build(n: int) -> torch.Tensor:
        if n == 9:
            tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
            alive.extend(t for t in tensors if t.shape in ((7, 13), (1, 7, 13)))
        return torch.full((7, 13), float(n))

    shape, kind = (7, 13), torch.float32
    pieces = [
        *(Piece(f"decoder.{n}", shape, kind, partial(build, n)) for n in range(6)),
        *(Piece("decoder.stack", shape, kind, partial(build, n), n - 8, 2) for n in (8, 9)),
    ]
    write_release(tmp_path, pieces, build_args(build_reference().config), [])
    assert len(alive) <= 2  # of the piece before
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check_files()
    assert torch.equal(checkpoint.read("decoder.5"), torch.full(shape, 5.0))
    assert checkpoint.read("decoder.stack")[:, 0, 0].tolist() == [8, 9]
