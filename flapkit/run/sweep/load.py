"""Load a sweep and its points, each a valid recipe; all problems are reported together."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flapkit.recipe.files import find_recipe, read
from flapkit.recipe.load import LoadedRecipe, build_recipe, component_names, load_plugins, read_tree
from flapkit.recipe.nodes import Node, Position, Problem, parse
from flapkit.recipe.overrides import override, override_position, put
from flapkit.recipe.validation import check
from flapkit.registry import Registry
from flapkit.run.sweep.schema import METHOD, PARAMETERS, SweepFile
from flapkit.system.errors import InputError, RecipeError, did_you_mean
from flapkit.system.paths import to_path

FIXED = {
    "plugins": "plugins are the same for all points; list them in the sweep's own `plugins`",
    "output": "a sweep writes no checkpoints; its own `output` is the folder of the results",
    "export": "a sweep writes no checkpoints, so there is nothing to export",
}
"""Keys of a recipe that neither a point nor the command line sets -> the reason."""


@dataclass(frozen=True, slots=True)
class Point:
    """One recipe of a sweep.

    Args:
        settings: dotted key -> the value that this point sets, as written in the file; not those of its method.
        recipe: the whole recipe.
        method: name of its method; None for none.
    """

    settings: Mapping[str, Any]
    recipe: LoadedRecipe
    method: str | None = None

    @property
    def label(self) -> str:
        """The method and the settings in one line."""
        return label(self.settings, self.method)


@dataclass(frozen=True, slots=True)
class Sweep:
    """A valid sweep.

    Args:
        path: the path of the file.
        file: the content of the file.
        points: the points, in the file's order.
    """

    path: Path
    file: SweepFile
    points: tuple[Point, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that points set beside those of their methods, in order of their first use."""
        return tuple(dict.fromkeys(key for point in self.points for key in point.settings))


@dataclass(frozen=True, slots=True)
class _Entry:
    """A point as the file writes it: the name of its method, the method's settings, and its own."""

    name: str | None
    method: Mapping[str, Node]
    settings: Mapping[str, Node]


def label(settings: Mapping[str, Any], method: str | None = None) -> str:
    """Write the method and the settings of a point in one line."""
    parts = [method] if method is not None else []
    return ", ".join([*parts, *(f"{key}={show(value)}" for key, value in settings.items())])


def show(value: Any) -> str:
    """Write a setting in short: a component with options like a call."""
    if isinstance(value, Mapping):
        options = ", ".join(f"{key}={show(option)}" for key, option in value.items() if key != "name")
        return f"{value.get('name', '')}({options})" if options else str(value.get("name", ""))
    if isinstance(value, (list, tuple)):
        return "+".join(map(show, value))
    return str(value)


def load_sweep(path: Path | str, overrides: Sequence[str] = ()) -> Sweep:
    """Load a sweep from a file.

    Args:
        path: the YAML file.
        overrides: ``key.path=value`` strings for all points; they replace values of the sweep's ``set``.

    Raises:
        RecipeError: all problems of the sweep, of its recipe and of every point, one a line.
    """
    path = Path(path)
    root, file = _file(path)
    recipe = _base(file, root, path)
    base, problems = read_tree(recipe)
    base_keys = base.value if isinstance(base.value, dict) else {}
    base_keys.setdefault("output", Node("unused", base.position, base.position))
    base_keys["plugins"] = Node(
        _items(base.child("plugins")) + _items(root.child("plugins")), root.position, root.position
    )
    registry, plugin_problems = load_plugins(base)
    problems += plugin_problems + _prepare(base, root, overrides)
    points, entries = [], _points(root)
    problems += _check_methods(root, entries)
    for entry in entries:
        point = _point(base, entry, path, registry, complete=not plugin_problems)
        if isinstance(point, list):
            problems += point
        else:
            points.append(point)
    problems += _check_plot(root, file)
    if problems:
        raise RecipeError(*dict.fromkeys(str(problem) for problem in sorted(problems, key=_place)))
    return Sweep(path, file, tuple(points))


def select(sweep: Sweep, only: Sequence[str]) -> Sweep:
    """Return a sweep with some of its points.

    Args:
        sweep: the sweep.
        only: ``key=value`` strings, the key a swept one or ``method``. A point is selected if each key has one of the
            values that are given for it.

    Raises:
        RecipeError: a key is not swept, or no point is selected.
    """
    asked: dict[str, set[str]] = {}
    for text in only:
        key, _, value = (part.strip() for part in text.partition("="))
        if key not in (known := (METHOD, *sweep.keys)):
            raise RecipeError(f"--only {text}: no point sets {key!r}{did_you_mean(key, known)}")
        asked.setdefault(key, set()).add(value)

    def is_asked(point: Point) -> bool:
        shown = {METHOD: point.method or "", **{key: show(value) for key, value in point.settings.items()}}
        return all(shown.get(key) in values for key, values in asked.items())

    points = tuple(point for point in sweep.points if is_asked(point))
    if not points:
        raise RecipeError(f"--only {' --only '.join(only)}: {sweep.path} has no such point")
    return replace(sweep, points=points)


def _file(path: Path) -> tuple[Node, SweepFile]:
    root, problems = parse(read(path), lambda line, column: Position(str(path), line, column))
    if root is None or not isinstance(root.value, dict):
        what = "a sweep is a section of keys: recipe, grid or points, and output"
        raise RecipeError(*(str(problem) for problem in problems or [Problem(Position(str(path), 1, 1), "", what)]))
    file = check(root, SweepFile)
    if problems or isinstance(file, list):
        problems += file if isinstance(file, list) else []
        raise RecipeError(*dict.fromkeys(str(problem) for problem in sorted(problems, key=_place)))
    return root, file


def _place(problem: Problem) -> tuple[str, int, int]:
    return problem.position.source, problem.position.line, problem.position.column


def _base(file: SweepFile, root: Node, path: Path) -> Path:
    """Find the base recipe: relative to the sweep's folder, or by name."""
    try:
        beside = to_path(file.recipe, path.parent)
        return find_recipe(beside if beside.is_file() else file.recipe)
    except InputError as error:
        node = root.child("recipe") or root
        raise RecipeError(str(Problem(node.position, "recipe", str(error)))) from error


def _prepare(base: Node, root: Node, overrides: Sequence[str]) -> list[Problem]:
    """Set the values for all points in the base recipe: those of the sweep's ``set``, then of the command line."""
    problems = []
    for key, value in _entries(root.child("set")):
        problems += _set(base, key, value)
    swept = {key for entry in _points(root) for key in (*entry.method, *entry.settings)}
    for text in overrides:
        key = text.partition("=")[0].strip()
        if reason := FIXED.get(key.split(".")[0]):
            problems.append(Problem(override_position(text), key, reason))
        elif key in swept:
            problems.append(Problem(override_position(text), key, "the points set this key; change the sweep's file"))
        problems += override(base, text, component_names())
    return problems


def _items(node: Node | None) -> list[Node]:
    return list(node.value) if node is not None and isinstance(node.value, list) else []


def _entries(node: Node | None) -> list[tuple[str, Node]]:
    return list(node.value.items()) if node is not None and isinstance(node.value, dict) else []


def _points(root: Node) -> list[_Entry]:
    """List every point: each method with the combinations of the grid, the last key fastest, then the listed points."""
    methods = {name: dict(_entries(settings)) for name, settings in _entries(root.child("methods"))}
    axes = [[(key, value) for value in _items(values)] for key, values in _entries(root.child("grid"))]
    grid = [dict(combination) for combination in itertools.product(*axes)] if methods or axes else []
    crossed: list[tuple[str | None, dict[str, Node]]] = [*methods.items()] or [(None, {})]
    points = [_Entry(name, method, cell) for name, method in crossed for cell in grid]
    for point in _items(root.child("points")):
        settings = dict(_entries(point))
        named = settings.pop(METHOD, None)
        name = None if named is None else str(named.value)
        points.append(_Entry(name, methods.get(name or "", {}), settings))
    return points


def _check_methods(root: Node, entries: Sequence[_Entry]) -> list[Problem]:
    """List methods that points name and nothing defines, and keys that both a method and its point set."""
    known = [name for name, _ in _entries(root.child("methods"))]
    named = [point.child(METHOD) for point in _items(root.child("points"))]
    unknown = [node for node in named if node is not None and node.value not in known]
    problems = [
        Problem(node.position, METHOD, f"no method is called {node.value!r}{did_you_mean(str(node.value), known)}")
        for node in unknown
    ]
    for entry in entries:
        twice = [value for key, value in entry.settings.items() if key in entry.method]
        what = f"the method {entry.name!r} sets this key too; remove one of the two"
        problems += [Problem(value.key_position, "", what) for value in twice]
    return problems


def _point(base: Node, entry: _Entry, path: Path, registry: Registry, *, complete: bool) -> Point | list[Problem]:
    root, settings = copy.deepcopy(base), [*entry.method.items(), *entry.settings.items()]
    problems = [problem for key, value in settings for problem in _set(root, key, value)]
    if problems:
        return problems
    recipe = build_recipe(root, path, registry, complete=complete)
    if isinstance(recipe, list):
        return recipe
    return Point({key: value.plain() for key, value in entry.settings.items()}, recipe, entry.name)


def _set(root: Node, key: str, value: Node) -> list[Problem]:
    if reason := FIXED.get(key.split(".")[0]):
        return [Problem(value.key_position, key, reason)]
    return put(root, key, copy.deepcopy(value), component_names())


def _check_plot(root: Node, file: SweepFile) -> list[Problem]:
    """List the keys of the plot that no point sets."""
    known = [PARAMETERS, *file.grid, *(key for point in file.points for key in point if key != METHOD)]
    node = root.child("plot") or root
    unknown = [key for key in (file.plot.x, *file.plot.over) if key not in known]
    return [Problem(node.position, "plot", f"no point sets {key!r}{did_you_mean(key, known)}") for key in unknown]
