"""The exported classes of an architecture, and their code in files that stand alone.

What the classes share is written once, in `checkpoint/exported/`; transformers loads a folder's
code best from flat files, so an export writes modules one behind the other, each before those that
import it, with their imports merged at the top: one file of configuration, one of the model.
"""

import ast
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

import torch

from megatron_satformer.checkpoint import exported
from megatron_satformer.model.architectures import find_architecture

WIDTH = 100


def model_class(architecture: str) -> Any:
    """The exported causal language model of an architecture."""
    return resolve_name(find_architecture(architecture).exported)


def config_class(architecture: str) -> Any:
    """The exported configuration of an architecture."""
    return model_class(architecture).config_class


def model_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of an exported model; tied embeddings once.

    Args:
        config: of `config_class`.
    """
    with torch.device("meta"):
        state = model_class(config.architecture)(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def build_auto_map(architecture: str) -> dict[str, str]:
    """Which classes transformers takes from the files that `write_code` writes."""
    return model_class(architecture).build_auto_map()


def write_code(architecture: str, folder: Path) -> None:
    """Writes the architecture's code into a folder, a file for each of its two modules."""
    causal = model_class(architecture)
    model, config = (sys.modules[c.__module__] for c in (causal, causal.config_class))
    for module, apart in ((config, None), (model, config)):
        text = flatten(module, None if module is apart else apart)
        (folder / f"{_leaf(module.__name__)}.py").write_text(text, encoding="utf-8")


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def flatten(module: ModuleType, apart: ModuleType | None = None) -> str:
    """Returns the source of a module and of all exported ones that it imports, as one file.

    Args:
        module: What the file is named after.
        apart: Another such file beside it, imported and not repeated.

    Raises:
        AssertionError: If two of them define the same name.
    """
    beside = set() if apart is None else {found.__name__ for found in _in_order(apart)}
    parts = [found for found in _in_order(module) if found.__name__ not in beside]
    imports: list[ast.Import | ast.ImportFrom] = []
    bodies = []
    for part in parts:
        tree, lines = ast.parse(_read(part)), _read(part).splitlines()
        for node in tree.body:
            ours = isinstance(node, ast.ImportFrom) and _exported_name(node, part)
            if ours in beside:
                assert apart is not None
                names = node.names  # type: ignore[attr-defined]
                imports.append(ast.ImportFrom(f".{_leaf(apart.__name__)}", names, 0))
            elif isinstance(node, ast.Import | ast.ImportFrom) and not ours:
                imports.append(node)
            if isinstance(node, ast.Import | ast.ImportFrom) or _is_heading(node, tree):
                assert node.end_lineno is not None
                lines[node.lineno - 1 : node.end_lineno] = [""] * (
                    node.end_lineno - node.lineno + 1
                )
        bodies.append("\n".join(lines).strip())
    defined = [name for body in bodies for name in _find_names(body)]
    assert len(defined) == len(set(defined)), sorted(n for n in defined if defined.count(n) > 1)
    head = f'"""{ast.get_docstring(ast.parse(_read(module)))}\n"""\n\n{_merge(imports)}'
    return "\n\n\n".join([head, *bodies]) + "\n"


def _is_heading(node: ast.stmt, tree: ast.Module) -> bool:
    """Whether a statement is its module's docstring or list of public names."""
    is_list = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    return node is tree.body[0] or is_list


def _in_order(module: ModuleType, seen: set[str] | None = None) -> Iterator[ModuleType]:
    """The module behind all exported ones that it imports, each once."""
    seen = set() if seen is None else seen
    seen.add(module.__name__)
    for node in ast.parse(_read(module)).body:
        name = _exported_name(node, module) if isinstance(node, ast.ImportFrom) else None
        if name is not None and name not in seen:
            yield from _in_order(import_module(name), seen)
    yield module


def _exported_name(node: ast.ImportFrom, module: ModuleType) -> str | None:
    """Full name of the exported module that an import names, if it names one."""
    if node.level:
        return f"{module.__name__.rpartition('.')[0]}.{node.module}"
    name = node.module or ""
    return name if name.startswith(f"{exported.__name__}.") else None


def _read(module: ModuleType) -> str:
    assert module.__file__ is not None
    return Path(module.__file__).read_text(encoding="utf-8")


def _find_names(body: str) -> list[str]:
    """What a module defines at its top."""
    names = []
    for node in ast.parse(body).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            names.append(ast.unparse(target))
    return names


def _merge(imports: list[ast.Import | ast.ImportFrom]) -> str:
    """The import statements, each module once: standard library, packages, what lies beside."""
    whole: set[str] = set()
    members: dict[str, set[str]] = {}
    for node in imports:
        names = {ast.unparse(alias) for alias in node.names}
        if isinstance(node, ast.Import):
            whole |= names
        else:
            members.setdefault(str(node.module), set()).update(names)
    lines = {name: f"import {name}" for name in sorted(whole)}
    lines |= {f"{name} ": _import_from(name, sorted(members[name])) for name in sorted(members)}
    blocks: list[list[str]] = [[], [], []]
    for name, line in lines.items():
        first = name.split(".")[0].strip()
        blocks[2 if not first else first not in sys.stdlib_module_names].append(line)
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _import_from(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= WIDTH:
        return line
    return f"from {module} import (\n{''.join(f'    {name},\n' for name in names)})"
