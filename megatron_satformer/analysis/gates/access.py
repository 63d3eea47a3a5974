"""Where a model shows the weights of its learned access, as rows and columns.

A row is a place that reads: a layer, or one of several in it. A column is a KV head of a gate, or
a source that is weighed, for one of several sums where there are few.

Shapes: b batch, s sequence, R rows, C columns.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_satformer.checkpoint.exported.modeling_access import LearnedAccess
from megatron_satformer.checkpoint.hugging_face.code import model_class

MOST_COLUMNS = 64
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:(.*)\.)?[^.]+$")


@dataclass(frozen=True)
class Point:
    """One place in a model where weights pass.

    Attributes:
        module: A hook on it sees them.
        row: Of the grid.
        static: Whether its weights are the same for every token.
    """

    module: LearnedAccess
    row: int
    static: bool


@dataclass(frozen=True)
class Grid:
    """Every weight of a model in its place.

    Attributes:
        points: All places.
        rows: Their names.
        columns: Names of the columns.
        cells: Of each point, the column of every weight. [weights]
        layers: Of each row, its layer from 1; None outside of layers.
        present: Which cells there are. [R, C]
        gate: Whether all are gates.
        dynamic: Whether tokens change any of them.
    """

    points: list[Point]
    rows: list[str]
    columns: list[str]
    cells: list[Tensor]
    layers: list[int | None]
    present: Tensor
    gate: bool
    dynamic: bool

    @property
    def value(self) -> str:
        """What is shown."""
        return "alpha" if self.gate else "weight"

    @property
    def zeros_at_start(self) -> float:
        """Share of exact zeros that is expected at initialisation."""
        return max(point.module.zeros for point in self.points)

    def place(self, weights: Sequence[Tensor]) -> Tensor:
        """Weights of every point, [b, s, weights] each -> [b, s, R, C], 0 where there are none.

        Where several weights have one column, the mean of their absolute values.
        """
        b, s, _ = weights[0].shape
        placed = weights[0].new_zeros(b, s, len(self.rows), len(self.columns))
        for point, cells, given in zip(self.points, self.cells, weights, strict=True):
            count = torch.bincount(cells, minlength=len(self.columns))
            merged = given.abs() if count.max() > 1 else given
            placed[:, :, point.row].index_add_(2, cells, merged / count[cells])
        return placed


def as_packaged(model: Any) -> Any:
    """The model in this package's class: a folder's own code may be older and show no weights.

    Raises:
        ValueError: It is of no architecture of the table.
    """
    name = getattr(model.config, "architecture", None)
    if name is None:
        raise ValueError(
            f"load (a {type(model).__name__}) must be a model of this package, whose layers read "
            "more than the layer before. A plain Transformer has nothing to analyze."
        )
    cls = model_class(name)
    if isinstance(model, cls):
        return model
    config = cls.config_class.from_dict(model.config.to_dict())
    own = cls.from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=model.dtype)
    return own.to(model.device).eval()


def find_points(model: nn.Module) -> list[tuple[str, LearnedAccess]]:
    """The names and modules that show weights.

    Raises:
        ValueError: There are none.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, LearnedAccess)]
    if not found:
        raise ValueError(
            f"architecture ({model.config.architecture}) must be one whose layers weigh what they "  # type: ignore[union-attr]
            "read of others: this one shows no weights, and there is nothing to analyze."
        )
    return found


@torch.inference_mode()
def build_grid(model: Any, ids: Tensor) -> Grid:
    """Finds out, by one pass, where which weights are.

    Args:
        model: From `as_packaged`.
        ids: A few tokens, [1, s].

    Raises:
        ValueError: There are none.
    """
    named = find_points(model)
    places = [_place_of(name) for name, _ in named]
    seen = list(dict.fromkeys(places))
    layers = [layer for layer, _ in seen]
    alone = len({layer for layer, _ in seen}) == len(seen)
    rows = [_row_name(*place, alone) for place in seen]
    with recorded([module for _, module in named]) as raw:
        model.model(ids, use_cache=False)
    points = [
        Point(module, seen.index(place), _is_static(found[-1]))
        for place, (_, module), found in zip(places, named, raw, strict=True)
    ]
    shapes = [_shape(found[-1]) for found in raw]
    gate = all(module.gate for _, module in named)
    pairs = [_pair_names(m, *shape[-2:]) for (_, m), shape in zip(named, shapes, strict=True)]
    columns = _in_order(pairs)
    if len(columns) > MOST_COLUMNS and not gate:
        pairs = [
            [name for _ in range(shape[-2]) for name in _names(m.sources, shape[-1])]
            for (_, m), shape in zip(named, shapes, strict=True)
        ]
        columns = _in_order(pairs)
    cells = [torch.tensor([columns.index(name) for name in names]) for names in pairs]
    present = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    for point, where in zip(points, cells, strict=True):
        present[point.row, where] = True
    dynamic = not all(point.static for point in points)
    return Grid(points, rows, columns, cells, layers, present, gate, dynamic)


def _place_of(name: str) -> tuple[int | None, str]:
    """Layer from 1 and what in it, of a module's name."""
    match = LAYER.search(name)
    if match is None:
        return None, "final"
    inside = (match[2] or "").rpartition(".")[2]
    return int(match[1]) + 1, inside.partition("_")[0]


def _row_name(layer: int | None, inside: str, alone: bool) -> str:
    if layer is None:
        return inside
    return str(layer) if alone else f"{layer} {inside}"


def _names(given: Sequence[str] | str, count: int) -> list[str]:
    names = [f"{given}{n}" for n in range(count)] if isinstance(given, str) else list(given)
    assert len(names) == count, (names, count)
    return names


def _pair_names(module: LearnedAccess, targets: int, sources: int) -> list[str]:
    """The column of every weight, [targets x sources]."""
    into, of = _names(module.targets, targets), _names(module.sources, sources)
    if module.gate:
        return [name for name in into for _ in of]
    return [f"{name} < {source}" if name else source for name in into for source in of]


def _in_order(names: Sequence[Sequence[str]]) -> list[str]:
    """Each name once, numbers in their order."""
    each = {name for some in names for name in some}
    return sorted(each, key=lambda name: [part.zfill(9) for part in re.split(r"(\d+)", name)])


def _is_static(weights: Tensor | tuple[Any, ...]) -> bool:
    return isinstance(weights, tuple) or weights.dim() < 3


def _as_tensor(weights: Tensor | tuple[Any, ...]) -> Tensor:
    if isinstance(weights, tuple):
        return torch.stack([torch.as_tensor(w).detach().float().reshape(()).cpu() for w in weights])
    return weights.detach()


def _shape(weights: Tensor | tuple[Any, ...]) -> tuple[int, ...]:
    """(..., targets, sources)."""
    shape = tuple(_as_tensor(weights).shape)
    return (*shape[:-1], 1, shape[-1]) if len(shape) in (1, 3) else shape


@contextmanager
def recorded(modules: Sequence[LearnedAccess]) -> Iterator[list[list[Any]]]:
    """While it is open, what passes each module is put at the end of its list."""
    found: list[list[Any]] = [[] for _ in modules]
    with ExitStack() as stack:
        for module, list_ in zip(modules, found, strict=True):
            handle = module.register_forward_hook(
                lambda _, __, output, kept=list_: kept.append(output)
            )
            stack.callback(handle.remove)
        yield found


@contextmanager
def watched(grid: Grid) -> Iterator[Callable[[tuple[int, ...]], tuple[Tensor, list[Tensor]]]]:
    """While it is open, hands out what the last pass over [b, s] tokens weighed.

    The function gives values [b, s, R, C] and, of every point, its weights as they are; both in
    float32 on the CPU.
    """
    with recorded([point.module for point in grid.points]) as found:

        def take(shape: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
            raw = [_as_tensor(kept.pop()).float().cpu() for kept in found]
            for kept in found:
                kept.clear()
            flat = [
                w.reshape(*shape, -1) if w.dim() > 2 else w.reshape(1, 1, -1).expand(*shape, -1)
                for w in raw
            ]
            return grid.place(flat), raw

        yield take


@contextmanager
def changed(changes: dict[LearnedAccess, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """While it is open, weights are replaced by what a function of them gives."""
    with ExitStack() as stack:
        for module, change in changes.items():
            handle = module.register_forward_hook(lambda _, __, output, f=change: f(output))
            stack.callback(handle.remove)
        yield
