"""What a folder says comes back field by field, after an import and after training; or is told."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megatron_satformer.checkpoint.convert.from_hf import import_from_hf
from megatron_satformer.checkpoint.convert.to_hf import export_to_hf
from megatron_satformer.checkpoint.megatron.reader import open_checkpoint
from tests.checkpoint.hugging_face.families import FAMILIES, LLAMA3, REFUSED, SMOLLM2

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
# what comes back otherwise, and why
ANEW = {
    "transformers_version": "of the program that wrote it",
    "_name_or_path": "a place on the machine that made it",
    "_from_model_config": "transformers' own note of how it made the file",
}
# what an export says besides, and why
ADDED = {
    "dtype": "the name of torch_dtype since transformers 4.56",
    "rope_parameters": "where transformers 5 has rope_theta",
    "head_dim": "said rather than derived",
    "layer_types": "Qwen's class writes what it derives",
    "pad_token_id": "null, which the class writes",
    "attention_bias": "false, which the class writes",
    "mlp_bias": "false, which the class writes",
    "sliding_window": "null, which the class writes",
}
NULL_TOKENIZER = "--mock-data --tokenizer-type NullTokenizer --vocab-size 100".split()


def write_folder(folder: Path, config: dict, generation: dict | None = None) -> Path:
    """The files as they are given, and random weights that fit them."""
    kind = CONFIG_MAPPING[config["model_type"]]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind.from_dict(dict(config)), dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    return folder


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def check_same(before: Path, after: Path, but: frozenset[str] = frozenset()) -> None:
    """Every field of both files, except `but`."""
    for name in ("config.json", "generation_config.json"):
        assert (before / name).is_file() == (after / name).is_file()
        if (before / name).is_file():
            told, back = read(before, name), read(after, name)
            kept = told.keys() - ANEW.keys() - but
            assert {field: back.get(field, "missing") for field in kept} == {
                field: told[field] for field in kept
            }
            assert back.keys() - told.keys() <= ADDED.keys(), name
            assert not ANEW.keys() & back.keys() - {"transformers_version"}


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(tmp_path, capsys, family):
    write_folder(tmp_path / "hf", *FAMILIES[family])
    import_from_hf(tmp_path / "hf", tmp_path / "megatron")
    told = capsys.readouterr().out
    carried = read(tmp_path / "hf", "config.json").keys() - {"model_type"}
    for name in carried & {"pretraining_tp", "max_window_layers", "use_mrope", "is_llama_config"}:
        assert name in told
    assert ("_name_or_path" in told) == (family == "SmolLM2")
    export_to_hf(tmp_path / "megatron", tmp_path / "back")
    check_same(tmp_path / "hf", tmp_path / "back")
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("hf", "back"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / f) for f in ("hf", "back")]
    assert type(models[0]) is type(models[1])
    ids = torch.randint(3, 100, (2, 40))
    with torch.no_grad():
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    before, after = (model.generation_config.to_diff_dict() for model in models)
    assert {k: v for k, v in before.items() if k not in ANEW} == {
        k: v for k, v in after.items() if k not in ANEW
    }


def train(pretrain, made, ranks: int, folder: Path, *flags: object) -> None:
    words = [word for flag in made.flags for word in flag.split()]
    start = ["--pretrained-checkpoint", made.folder, "--save", folder, "--load", folder]
    short = "--seq-length 32 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --num-workers 0"
    short += " --eval-iters 0 --eval-interval 100 --save-interval 1"
    pretrain(ranks, *words, *start, *short.split(), *flags)


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_training_hands_it_on(pretrain, tmp_path, family):
    """Through a start, on two pipeline stages for one of them, and a resume."""
    write_folder(tmp_path / "hf", *FAMILIES[family])
    made = import_from_hf(tmp_path / "hf", tmp_path / "megatron")
    ranks = 2 if family == "Llama 3" else 1
    stages = ["--pipeline-model-parallel-size", ranks, "--train-iters", 1]
    train(pretrain, made, ranks, tmp_path / "run", *NULL_TOKENIZER, *stages)
    train(
        pretrain,
        made,
        1,
        tmp_path / "run",
        *NULL_TOKENIZER,
        "--train-iters",
        2,
        "--no-load-rng",
        "--no-load-optim",
        "--override-opt-param-scheduler",
    )
    assert open_checkpoint(tmp_path / "run").step == 2
    export_to_hf(tmp_path / "run", tmp_path / "back")
    check_same(tmp_path / "hf", tmp_path / "back")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(model).__name__ == FAMILIES[family][0]["architectures"][0]


@pytest.mark.parametrize("told", REFUSED)
def test_another_computation_is_refused_by_name(tmp_path, capsys, told):
    config = REFUSED[told]
    plain = {"olmo": "llama", "olmo2": "llama", "granite": "llama"}
    kind = plain.get(config["model_type"], config["model_type"])
    harmless = {"tie_word_embeddings": False} | {"mlp_bias": False} if kind == "llama" else {}
    write_folder(tmp_path / "hf", LLAMA3 | {"model_type": kind} | harmless)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        import_from_hf(tmp_path / "hf", tmp_path / "megatron")
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]


def test_what_training_changed_wins(tmp_path):
    """As the args of its checkpoint say it; the rest still comes back."""
    write_folder(tmp_path / "hf", *FAMILIES["Llama 3"])
    import_from_hf(tmp_path / "hf", tmp_path / "megatron", dtype="fp32")
    checkpoint = open_checkpoint(tmp_path / "megatron")
    rewrite_args(tmp_path / "megatron", max_position_embeddings=128, rotary_base=1000000)
    export_to_hf(tmp_path / "megatron", tmp_path / "back")
    check_same(
        tmp_path / "hf",
        tmp_path / "back",
        frozenset({"max_position_embeddings", "rope_theta", "torch_dtype"}),
    )
    config = read(tmp_path / "back", "config.json")
    assert (config["max_position_embeddings"], config["rope_theta"]) == (128, 1e6)
    assert config["rope_parameters"]["rope_theta"] == 1e6
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert checkpoint.args.max_position_embeddings == 64


def rewrite_args(folder: Path, **changes) -> None:
    """Saves the checkpoint once more with other args."""
    from megatron_satformer.checkpoint.megatron.release import Piece, write_release

    checkpoint = open_checkpoint(folder)
    tensors = {key: checkpoint.read(key) for key in checkpoint.tensors}
    pieces = [
        Piece(key, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for key, tensor in tensors.items()
    ]
    vars(checkpoint.args).update(changes)
    shutil.rmtree(folder)
    write_release(folder, pieces, checkpoint.args, [])


def test_a_broken_generation_config_is_named(tmp_path):
    write_folder(tmp_path / "hf", SMOLLM2)
    (tmp_path / "hf" / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json cannot be read as JSON"):
        import_from_hf(tmp_path / "hf", tmp_path / "megatron")
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]
