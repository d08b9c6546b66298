"""Find and read recipe files: the user's, and those shipped with flapkit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flapkit
from flapkit.recipe.nodes import Position, parse
from flapkit.system.errors import RecipeError, did_you_mean
from flapkit.system.paths import to_path

_SUFFIXES = (".yaml", ".yml")


def shipped_recipes() -> dict[str, Path]:
    """Map the names of the shipped recipes to their files, sorted by name."""
    return _shipped("*.yaml")


def shipped_sweeps() -> dict[str, Path]:
    """Map the names of the shipped sweeps to their files, sorted by name."""
    return _shipped("sweeps/*.yaml")


def _shipped(pattern: str) -> dict[str, Path]:
    package = Path(flapkit.__file__).parent
    folder = package / "_recipes"
    if not folder.is_dir():
        folder = package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob(pattern))}


def find_sweep(name_or_path: Path | str) -> Path:
    """Find a sweep: a file, or a shipped sweep by name.

    Raises:
        RecipeError: there is no such file or name.
    """
    return _find(name_or_path, shipped_sweeps(), "sweep")


def find_recipe(name_or_path: Path | str) -> Path:
    """Find a recipe: a file, or a shipped recipe by name.

    Args:
        name_or_path: for example ``./mine.yaml`` or ``llama-7b-flap20``.

    Raises:
        RecipeError: there is no such file or name.
    """
    return _find(name_or_path, shipped_recipes(), "recipe")


def _find(name_or_path: Path | str, shipped: Mapping[str, Path], what: str) -> Path:
    path = to_path(name_or_path)
    if path.is_file():
        return path
    if str(name_or_path) in shipped:
        return shipped[str(name_or_path)]
    problem = "is a folder" if path.is_dir() else f"no such file, and no shipped {what} of this name"
    name = path.stem if path.suffix in _SUFFIXES else path.name
    raise RecipeError(f"{name_or_path}: {problem}{did_you_mean(name, shipped)}")


def read(path: Path) -> str:
    """Read a recipe's text.

    Raises:
        RecipeError: the file is missing or cannot be read, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8", errors="replace")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise RecipeError(f"{path}:{line}:{column}: not UTF-8; save the recipe as UTF-8") from error


def read_settings(path: Path) -> dict[str, Any]:
    """Read a recipe that a run wrote, as plain data, without checking its keys.

    Raises:
        RecipeError: the file cannot be read, or is not the YAML of a recipe.
    """
    root, problems = parse(read(path), lambda line, column: Position(str(path), line, column))
    if problems or root is None or not isinstance(root.value, dict):
        raise RecipeError(*([str(problem) for problem in problems] or [f"{path}: expected a section of keys"]))
    settings: dict[str, Any] = root.plain()
    return settings
