"""The JSON schema of recipes, for editors and the documentation."""

from __future__ import annotations

from typing import Any, get_args

import pydantic

from flapkit.recipe.schema import KEYS, SEVERAL, ComponentSpec, Recipe
from flapkit.registry import KINDS, Registry
from flapkit.system.errors import PluginError

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema(registry: Registry) -> dict[str, Any]:
    """Describe recipes as JSON schema (draft 2020-12), with the options of every known component.

    Args:
        registry: the components.

    Raises:
        PluginError: a component has an option that JSON cannot express.
    """
    components = {(kind.name, name): component for kind in KINDS for name, component in registry.names(kind).items()}
    types: dict[Any, type[Any]] = {"recipe": Recipe, **components}
    inputs: list[tuple[Any, Any, pydantic.TypeAdapter[Any]]] = [
        (key, "validation", pydantic.TypeAdapter(of)) for key, of in types.items()
    ]
    try:
        schemas, definitions = pydantic.TypeAdapter.json_schemas(inputs)
    except pydantic.errors.PydanticUserError as error:
        raise PluginError(f"an option of a component has no JSON schema: {error.message}") from error
    parts: dict[str, dict[str, Any]] = definitions["$defs"]
    references = {key: schema["$ref"].rpartition("/")[2] for (key, _), schema in schemas.items()}
    for key, reference in references.items():
        if key != "recipe":
            _add_name(parts[reference], key[1])
    del parts["ComponentSpec"]
    recipe = parts.pop(references["recipe"])
    for kind in KINDS:
        key = KEYS[kind.name]
        known = {name: references[kind.name, name] for name in registry.names(kind)}
        recipe["properties"][key] = _component(recipe["properties"][key], kind.name, known)
    return {"$schema": DRAFT, **recipe, "$defs": parts}


def _add_name(options: dict[str, Any], name: str) -> None:
    """Add the component's name to the schema of its options, in place."""
    named = {"const": name, "type": "string", "description": "Name of the component."}
    options["properties"] = {"name": named, **options.get("properties", {})}
    options["required"] = ["name", *options.get("required", [])]


def _component(field: dict[str, Any], kind: str, references: dict[str, str]) -> dict[str, Any]:
    """Describe a component's key: a name, a section with that component's options, or, where allowed, a list."""
    branches: list[dict[str, Any]] = [{"enum": sorted(references)}]
    branches += [{"$ref": f"#/$defs/{reference}"} for reference in references.values()]
    declared = Recipe.model_fields[KEYS[kind]]
    default = declared.default
    if type(None) in get_args(declared.annotation):
        branches.append({"type": "null"})
    if kind in SEVERAL:
        branches.append({"type": "array", "items": {"oneOf": list(branches)}})
    schema = {"description": field["description"], "oneOf": branches}
    first = next(iter(default), []) if kind in SEVERAL else default
    return {**schema, "default": first.name if isinstance(first, ComponentSpec) else first}
