"""Read an architecture's declaration from a YAML file that a recipe's ``plugins`` names."""

from __future__ import annotations

from pathlib import Path

from flapkit.model.declaration import Family
from flapkit.recipe.files import read
from flapkit.recipe.nodes import Position, parse
from flapkit.recipe.validation import check
from flapkit.system.errors import PluginError, RecipeError


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
