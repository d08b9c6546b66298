"""Check a recipe's tree against types, and report each problem with its position."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, TypeVar, get_args, get_type_hints

import pydantic

from flapkit.recipe.nodes import Node, Problem
from flapkit.system.errors import FlapkitError, closest, did_you_mean

T = TypeVar("T")

_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
    "dataclass_type": "a section of keys",
    "path_type": "a path",
}
_BOUNDS = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "over {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "under {lt}",
}
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_MAX_SHOWN = 60
_MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")


@lru_cache(maxsize=256)
def adapter_of(of: Any) -> pydantic.TypeAdapter[Any]:
    """Build the validator of a type, once: a sweep validates the same few types at every point."""
    return pydantic.TypeAdapter(of)


def check(node: Node, of: type[T], key: str = "") -> T | list[Problem]:
    """Build a section, or a component, from a tree.

    The tree is checked as JSON in pydantic's strict mode: text is not a number, 1.0 is not a whole number, but a whole
    number is a number.

    Args:
        node: the tree.
        of: a pydantic model or a dataclass.
        key: the dotted key of the tree within the recipe.

    Returns:
        The section or component, or its problems.
    """
    try:
        options = node.value if isinstance(node.value, dict) else {}
        context = {"folders": {name: option.folder for name, option in options.items()}}
        kind: Any = of
        built: T = adapter_of(kind).validate_json(json.dumps(node.plain()), strict=True, context=context)
        return built
    except pydantic.ValidationError as error:
        return _problems(error.errors(include_url=False), node, of, key)
    except pydantic.errors.PydanticUserError as error:
        return [Problem(node.position, key, f"the options of {of.__qualname__} cannot be read: {error.message}")]
    except FlapkitError as error:
        return [Problem(node.position, key, str(error))]


def _problems(errors: Sequence[Any], root: Node, of: type[Any], prefix: str) -> list[Problem]:
    """Turn pydantic's errors into problems: one for each position, the branches of a union joined by ``or``."""
    problems: list[Problem] = []
    expected: dict[str, tuple[Node, list[str]]] = {}
    intended = _intended(errors, root, of)
    for error in errors:
        node, path, rest = _find(root, error["loc"])
        key = ".".join(part for part in (prefix, *map(str, path)) if part)
        if error["type"] in _UNKNOWN:
            problems.append(Problem(node.key_position, key, _unknown(of, path)))
        elif error["type"] in _MISSING:
            # A key whose value is null is there, but says nothing.
            missing = ".".join([key, *map(str, rest[-1:])]).lstrip(".")
            if (*path, *rest[-1:]) not in intended:
                problems.append(Problem(node.position, missing, "required, but missing"))
        elif (phrase := _expectation(error)) is not None:
            phrases = expected.setdefault(key, (node, []))[1]
            phrases.extend([phrase] * (phrase not in phrases))
        else:
            problems.append(Problem(node.position, key, error["msg"].removeprefix("Value error, ")))
    for key, (node, phrases) in expected.items():
        what = f"expected {' or '.join(phrases)}, got {_shown(node)}{_hint(node, phrases)}"
        problems.append(Problem(node.position, key, what))
    return problems


def _unknown(of: Any, path: Sequence[int | str]) -> str:
    return f"unknown key{did_you_mean(str(path[-1]), _known(of, path[:-1]))}"


def _find(root: Node, loc: Sequence[int | str]) -> tuple[Node, list[int | str], list[int | str]]:
    """Follow an error's location in the tree; parts that pydantic adds to name a union's branch are skipped."""
    node, path, rest = root, [], []
    for part in loc:
        child = node.child(part)
        if child is None:
            rest.append(part)
        else:
            node = child
            path.append(part)
    return node, path, rest


def _intended(errors: Sequence[Any], root: Node, of: type[Any]) -> set[tuple[int | str, ...]]:
    """List the keys that misspelt keys probably stand for, so that these are not also reported as missing."""
    paths = [_find(root, error["loc"])[1] for error in errors if error["type"] in _UNKNOWN]
    return {(*path[:-1], closest(str(path[-1]), _known(of, path[:-1])) or "") for path in paths}


def _known(of: Any, path: Sequence[int | str]) -> set[str]:
    """Return the known keys of the section at a path."""
    sections = _sections(of)
    for part in path:
        if isinstance(part, str):
            sections = [inner for section in sections for inner in _sections(_fields(section).get(part))]
    return {name for section in sections for name in _fields(section)}


def _sections(annotation: Any) -> list[type[Any]]:
    """List the models and dataclasses in an annotation."""
    if isinstance(annotation, type) and (issubclass(annotation, pydantic.BaseModel) or is_dataclass(annotation)):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections(argument)]


def _fields(section: type[Any]) -> dict[str, Any]:
    """Map a section's keys to the types of their values."""
    if issubclass(section, pydantic.BaseModel):
        return {name: field.annotation for name, field in section.model_fields.items()}
    hints = get_type_hints(section)
    return {field.name: hints[field.name] for field in fields(section) if field.init}


def _expectation(error: Any) -> str | None:
    """Return the words that follow ``expected`` in the message, or None if the error's own message is used."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "literal_error":
        return str(context["expected"])
    if kind in _BOUNDS:
        return _BOUNDS[kind].format(**context)
    return _TYPES.get(kind)


def _shown(node: Node) -> str:
    """Write a value as in a recipe, shortened."""
    if isinstance(node.value, dict):
        return "a section of keys"
    if isinstance(node.value, list):
        return "a list"
    if isinstance(node.value, str):
        return repr(node.value if len(node.value) <= _MAX_SHOWN else node.value[:_MAX_SHOWN] + "…")
    if isinstance(node.value, float) and not math.isfinite(node.value):
        return str(node.value).replace("inf", ".inf").replace("nan", ".nan")
    return json.dumps(node.value)


def _hint(node: Node, phrases: Sequence[str]) -> str:
    """Return a hint with the expected word that is closest to the value."""
    words = [word for phrase in phrases for word in re.findall(r"'([^']*)'", phrase)]
    close = closest(node.value, words) if isinstance(node.value, str) else None
    return f"; did you mean {close!r}?" if close else ""
