"""Load plugin files: Python, and architectures declared in YAML."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from flapkit.model.declaration import Family
from flapkit.recipe.files import read
from flapkit.recipe.nodes import Position, parse
from flapkit.recipe.validation import check
from flapkit.registry import Registry
from flapkit.system.errors import PluginError, RecipeError


def load_registry(files: Iterable[Path] = ()) -> Registry:
    """Load every installed plugin, then local files.

    Raises:
        PluginError: a plugin or a file cannot be loaded.
    """
    registry = Registry.load()
    for path in files:
        add_file(registry, path)
    return registry


def add_file(registry: Registry, path: Path) -> None:
    """Add a local file's components to a registry, in place.

    Args:
        registry: takes them in.
        path: a Python file, loaded as a plugin, or a YAML file, an architecture's declaration.

    Raises:
        PluginError: the file is missing, or is neither.
    """
    if path.suffix in (".yaml", ".yml"):
        registry.add_family(load_family(path), str(path))
    else:
        registry.add_module(path)


def load_family(path: Path) -> Family:
    """Read a declaration; its keys are the fields of ``flapkit.model.declaration.Family``.

    Raises:
        PluginError: all problems of the file, each with line and column.
    """
    try:
        root, problems = parse(read(path), lambda line, column: Position(str(path), line, column))
    except RecipeError as error:
        raise PluginError(str(error)) from error
    if root is None and not problems:
        raise PluginError(f"{path}: the file is empty; it needs name, model_types, layers and blocks")
    if root is not None and not problems:
        family = check(root, Family)
        if isinstance(family, Family):
            return family
        problems = family
    raise PluginError("\n".join(str(problem) for problem in problems))
