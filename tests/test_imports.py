"""Imports point one way: config <- model <- parallel, and rooms that know nothing of each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_satformer"
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))

# What each room of the package may import of the others.
MAY_IMPORT = {
    "unsupported": set(),
    "sizes": set(),
    "fitting": set(),
    "expert_layout": {"fitting"},
    "layout": {"benchmark", "expert_layout", "fitting"},
    "step_findings": set(),
    "step_checks": {"checkpoint", "cli", "step_findings"},
    "wandb_run": {"files"},
    "metrics": {"benchmark", "files", "model"},
    "config": set(),
    "arguments": {"cli", "config", "layout", "model", "plan_options", "required", "sizes"},
    "required": {"fitting"},
    "stopping": set(),
    "refusals": {"arguments", "config", "model", "unsupported"},
    "cli": set(),
    "files": set(),
    "machine": set(),
    "report": {"config", "model", "parallel", "required"},
    "backend": {"config"},
    "benchmark": {"arguments", "backend", "checkpoint", "config", "data", "files", "model"},
    "model": {"config", "unsupported"},
    "parallel": {"config", "model"},
    "plan_options": set(),
    "planning": {
        *("arguments", "backend", "benchmark", "cli", "config", "metrics", "model", "parallel"),
        "required",
    },
    "data": {"cli", "files"},
    "checkpoint": {"config", "unsupported", "model", "parallel", "backend", "data", "files"},
    "analysis": {"checkpoint", "cli", "data", "files"},
    "comparison": {"analysis", "data", "files", "model", "quickstart", "sizes"},
    "quickstart": {"analysis", "checkpoint", "cli", "data", "files"},
}
# Outside modules, and the only files or rooms that may import them.
ONLY_IN = {
    "megatron.training": {
        "arguments",
        "backend/cpu",
        "model/builder",
        "config",
        "backend/parameter_groups",
        "backend/schedule",
        "checkpoint/megatron/saving",
        "metrics",
        "step_checks",
        "stopping",
    },
    # data/tokenizers: a Hugging Face tokenizer's class, named in its config, may change the ids.
    "transformers": {"checkpoint", "analysis", "benchmark/hugging_face", "data/tokenizers"},
    "transformer_engine": set(),
    "tools": set(),
    "pretrain_satformer": set(),
    "tests": set(),
}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]


def imported_modules(path: Path) -> list[tuple[int, str]]:
    """Every import with its line, relative ones made absolute, also those inside functions."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = [*base, *([node.module] if node.module else [])]
            # `from package import module` imports that module too.
            found += [(node.lineno, ".".join([*origin, alias.name])) for alias in node.names]
    return found


def wrong_imports(path: Path) -> list[str]:
    room = room_of(path)
    here = path.relative_to(ROOT / PACKAGE).with_suffix("").as_posix()
    wrong = []
    for line, name in imported_modules(path):
        top, _, rest = name.partition(".")
        other = rest.split(".")[0]
        upward = top == PACKAGE and other in MAY_IMPORT and other not in MAY_IMPORT[room] | {room}
        barred = any(
            name == module or name.startswith(f"{module}.")
            for module, places in ONLY_IN.items()
            if not any(here == place or here.startswith(f"{place}/") for place in places)
        )
        if upward or barred:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return wrong


def test_every_room_is_known():
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms <= MAY_IMPORT.keys(), "a new room needs a line in MAY_IMPORT"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_upward_import(path):
    if room_of(path) == "__init__":
        pytest.skip("the package's own __init__ belongs to no room")
    assert not wrong_imports(path)


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("config.py", "from megatron_satformer import model"),
        ("model/specs.py", "from megatron_satformer.parallel.carry import pack"),
        ("model/specs.py", "from ..parallel import carry"),
        ("model/gates.py", "import transformers"),
        ("model/gates.py", "def f():\n    import transformer_engine.pytorch"),
        ("data/preprocess/main.py", "from megatron_satformer.config import SATFormerConfig"),
        ("data/preprocess/main.py", "from megatron import training"),
        ("checkpoint/to_hf.py", "from megatron.training.checkpointing import load_checkpoint"),
        ("analysis/plots.py", "from pretrain_satformer import build_model_config"),
    ],
)
def test_an_upward_import_is_found(tmp_path, monkeypatch, place, line):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / PACKAGE / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{line}\n")
    assert len(wrong_imports(path)) == 1


def test_an_allowed_import_is_not_found(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / PACKAGE / "parallel/carry.py"
    path.parent.mkdir(parents=True)
    path.write_text("from megatron_satformer.model import layer\nfrom . import p2p\n")
    assert not wrong_imports(path)
