"""The code that an export writes: flat files that need torch, transformers, and nothing of ours."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_satformer.checkpoint.hugging_face.code import (
    build_auto_map,
    flatten,
    model_class,
    write_code,
)
from megatron_satformer.model.architectures import TABLE
from tests.models import build_twin, save_exported

EVERY = pytest.mark.parametrize("architecture", TABLE)
SHAPE = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
OURS = {"megatron", "megatron_satformer", "tests"}
# code folder by code folder, the modules of each: shapes of the model's tensors, by name
IMPORT = """
import importlib, json, sys
import torch
root, jobs = sys.argv[1:]
sys.path.insert(0, root)
found = {}
for name, (where, shape) in json.loads(jobs).items():
    module, _, causal = where.rpartition(".")
    causal = getattr(importlib.import_module(f"{name}.{module}"), causal)
    with torch.device("meta"):
        state = causal(causal.config_class(**shape)).state_dict()
    found[name] = {key: list(tensor.shape) for key, tensor in state.items()}
print(json.dumps({"shapes": found, "modules": sorted({m.split(".")[0] for m in sys.modules})}))
"""
# every folder below one: its logits, and the model saved again below another
LOAD = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
root, again, ids = Path(sys.argv[1]), Path(sys.argv[2]), torch.load(sys.argv[3])
again.mkdir()
for folder in root.iterdir():
    if folder.is_dir():
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        with torch.no_grad():
            torch.save(model(ids).logits, again / f"{folder.name}.pt")
        model.save_pretrained(again / folder.name)
print(json.dumps(sorted({m.split(".")[0] for m in sys.modules})))
"""


def run_alone(script: str, folder: Path, *args: object) -> object:
    """Runs it with nothing of ours on the path, in another folder; returns what it prints."""
    environment = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "PATH": os.defpath}
    run = subprocess.run(
        [sys.executable, "-I", "-c", script, *map(str, args)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def read_code(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.glob("*.py")}


@EVERY
def test_imports_torch_and_transformers_alone(architecture, tmp_path):
    write_code(architecture, tmp_path)
    places = build_auto_map(architecture)
    modules = {file.stem for file in tmp_path.iterdir()}
    assert modules == {place.partition(".")[0] for place in places.values()}
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    for file in tmp_path.iterdir():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert (node.level, node.module in modules - {file.stem}) == (1, True)
            elif isinstance(node, ast.ImportFrom):
                assert node.module.partition(".")[0] in allowed


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """What a process that has the folders of code, and nothing else of ours, finds in them."""
    folder, jobs = tmp_path_factory.mktemp("alone"), {}
    for architecture in TABLE:
        (folder / "root" / architecture).mkdir(parents=True)
        write_code(architecture, folder / "root" / architecture)
        jobs[architecture] = build_auto_map(architecture)["AutoModelForCausalLM"], SHAPE
    return run_alone(IMPORT, folder, folder / "root", json.dumps(jobs))


@EVERY
def test_the_flat_class_has_the_same_tensors(imported, architecture):
    causal = model_class(architecture)
    with torch.device("meta"):
        state = causal(causal.config_class(**SHAPE)).state_dict()
    found = imported["shapes"][architecture]
    assert found == {name: list(tensor.shape) for name, tensor in state.items()}
    assert not OURS.intersection(imported["modules"])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Folder with first/, exported, second/ and third/, each what a process made of the one before;
    with twins by architecture, and the ids that all have read."""
    folder = tmp_path_factory.mktemp("loaded")
    twins = {name: build_twin(name, **SHAPE, scale=0.2).eval() for name in TABLE}
    for name, twin in twins.items():
        save_exported(twin, folder / "first" / name, max_position_embeddings=64)
    ids = torch.randint(60, (2, 17), generator=torch.Generator().manual_seed(1))
    torch.save(ids, folder / "ids.pt")
    for source, target in (("first", "second"), ("second", "third")):
        modules = run_alone(LOAD, folder, folder / source, folder / target, folder / "ids.pt")
        assert not OURS.intersection(modules)
    return folder, twins, ids


@EVERY
@pytest.mark.slow
def test_a_folder_loads_alone_and_so_does_what_is_saved_of_it(loaded, architecture):
    folder, twins, ids = loaded
    expected = twins[architecture](ids).logits
    first, second = (torch.load(folder / f / f"{architecture}.pt") for f in ("second", "third"))
    assert expected.std() > 0.5
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(second, first)
    code = [read_code(folder / f / architecture) for f in ("first", "second", "third")]
    assert code[0]
    assert code[0] == code[1] == code[2]
    configs = [
        json.loads((folder / f / architecture / "config.json").read_text())
        for f in ("first", "second", "third")
    ]
    assert configs[1] == configs[2]
    assert configs[0]["auto_map"] == configs[1]["auto_map"]
    assert {config["architecture"] for config in configs} == {architecture}


@pytest.fixture
def write_modules(tmp_path, monkeypatch):
    """Writes modules of a package by file name; returns the one called whole."""

    def write(**sources: str):
        package = f"modules_{abs(hash(tmp_path))}"
        (tmp_path / package).mkdir()
        for name, source in sources.items():
            (tmp_path / package / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        return importlib.import_module(f"{package}.whole")

    return write


BASE = '"""Base."""\n\nimport math\n\nfrom torch import nn\n\nTWO = 2\n\n\nclass Base:\n    pass\n'


def test_what_is_imported_comes_first_and_once(write_modules):
    whole = write_modules(
        base=BASE,
        middle='"""Middle."""\n\nfrom .base import Base\n\n\nclass Middle(Base):\n    pass\n',
        whole='"""Whole.\n\nIts second line.\n"""\n\nimport math\n\nfrom .base import TWO, Base\n'
        "from .middle import Middle\n\n\nclass Whole(Middle):\n    value = TWO + math.floor(0.5)\n"
        '\n\n__all__ = ["Whole"]\n',
    )
    text = flatten(whole)
    names = {}
    exec(text, names)
    assert ast.get_docstring(ast.parse(text)) == "Whole.\n\nIts second line."
    assert [c.__name__ for c in names["Whole"].__mro__] == ["Whole", "Middle", "Base", "object"]
    assert names["Whole"].value == 2
    assert text.count("import math") == text.count("class Base") == 1
    assert "__all__" not in text


@pytest.mark.parametrize(
    "second", ["class Base:\n    pass\n", "def Base():\n    pass\n", "TWO = 3\n"]
)
def test_two_definitions_of_one_name_are_refused(write_modules, second):
    whole = write_modules(base=BASE, whole=f'"""Whole."""\n\nfrom .base import nn\n\n{second}')
    with pytest.raises(AssertionError, match="TWO" if "TWO" in second else "Base"):
        flatten(whole)
