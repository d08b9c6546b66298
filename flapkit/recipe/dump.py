"""Write a recipe as YAML that loads to an equal recipe."""

from __future__ import annotations

import re
from typing import Any

import yaml

from flapkit.recipe.load import LoadedRecipe
from flapkit.recipe.nodes import FLOAT, INTEGER
from flapkit.recipe.schema import KEYS, SEVERAL, Recipe
from flapkit.system.paths import names_only

PUBLISHED = "# Files are named without their folders; recipe.local.yaml has them, where the recipe was run.\n"

_LINE_BREAKS = frozenset("\x85\u2028\u2029")


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.2 would read as a number, and writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write repeated values out."""
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Escape Unicode line breaks, which YAML reads as spaces outside double quotes."""
        style = '"' if _LINE_BREAKS.intersection(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)

for _tag, _pattern in (("int", INTEGER), ("float", FLOAT)):
    _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, list("-+.0123456789"))


def dump_recipe(recipe: LoadedRecipe | Recipe) -> str:
    """Write a recipe with every default.

    Args:
        recipe: a loaded recipe, whose components' options are written too, or its schema object alone.

    Returns:
        YAML that loads to an equal recipe.
    """
    return _dump(_data(recipe))


def dump_published(recipe: LoadedRecipe | Recipe) -> str:
    """Write a recipe with every default for others to read: files by their names, without folders of this machine.

    Args:
        recipe: as ``dump_recipe`` takes it.

    Returns:
        The YAML of ``dump_recipe`` where the recipe names no such folder, else with a comment that says so.
    """
    data = _data(recipe)
    published = names_only(data)
    return _dump(data) if published == data else PUBLISHED + _dump(published)


def _data(recipe: LoadedRecipe | Recipe) -> dict[str, Any]:
    bare = recipe.recipe if isinstance(recipe, LoadedRecipe) else recipe
    data: dict[str, Any] = bare.model_dump(mode="json")
    for kind, key in KEYS.items():
        specs = [_shortest(spec) for spec in (data[key] if kind in SEVERAL else [data[key]])]
        data[key] = specs[0] if len(specs) == 1 else specs
    return data


def _dump(data: Any) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _shortest(spec: dict[str, Any] | None) -> dict[str, Any] | str | None:
    """Write a component without options as its name alone."""
    return spec["name"] if spec is not None and set(spec) == {"name"} else spec
