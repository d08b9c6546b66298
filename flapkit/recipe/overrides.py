"""Overrides from the command line: ``--set budget.ratio=0.3``."""

from __future__ import annotations

from collections.abc import Mapping

from flapkit.recipe.nodes import Node, Position, Problem, parse
from flapkit.system.errors import did_you_mean


def override_position(text: str) -> Position:
    """Return the position of values that an override sets."""
    return Position(f"--set {text}")


def override(root: Node, text: str, names: Mapping[str, str | None]) -> list[Problem]:
    """Set one key of a recipe's tree, in place; missing parent sections are created.

    Args:
        root: the recipe.
        text: ``key.path=value``; a part of the path is a key, or an index into a list. The value is YAML.
        names: each key whose section can be written as a plain name -> its default name.

    Returns:
        The problems of the override.
    """
    position = override_position(text)
    key, equals, value = text.partition("=")
    if not equals or not all(key.strip().split(".")):
        return [Problem(position, "", "expected key=value, such as budget.ratio=0.3")]
    new, problems = parse(value, lambda line, column: position)
    if problems:
        return [Problem(position, key, problem.what) for problem in problems]
    return put(root, key.strip(), new or Node(None, position, position), names)


def put(root: Node, key: str, new: Node, names: Mapping[str, str | None]) -> list[Problem]:
    """Set one key of a recipe's tree to a tree, in place; missing parent sections are created.

    Args:
        root: the recipe.
        key: the dotted key.
        new: the value and its position.
        names: as in ``override``.

    Returns:
        The problems of the key.
    """
    position, parts = new.key_position, key.split(".")
    if not all(parts):
        return [Problem(position, key, "expected a dotted key, such as budget.ratio")]
    parent = root
    for depth, part in enumerate(parts[:-1], start=1):
        in_list = isinstance(parent.value, list)
        is_component = parts[0] in names and depth == (2 if in_list else 1)
        child = _child(parent, part, position, names.get(part) if depth == 1 else None, is_component)
        if isinstance(child, str):
            return [Problem(position, ".".join(parts[:depth]), child)]
        parent = child
    what = _put(parent, parts[-1], new)
    return [Problem(position, key, what)] if what else []


def _child(parent: Node, part: str, at: Position, default: str | None, is_component: bool) -> Node | str:
    """Return the child section at one part of the path, created if missing; or the problem.

    Args:
        parent: the node that the path has reached.
        part: the key or the index.
        at: the override's position.
        default: the default name of the key.
        is_component: the child may be a plain name.
    """
    if isinstance(parent.value, list):
        if problem := _no_entry(parent.value, part):
            return problem
        child = parent.value[int(part)]
    elif isinstance(parent.value, dict):
        child = parent.value.setdefault(part, Node(default, at, at))
    else:
        return _nothing_below(parent)
    if child.value is None:
        child.value = {}
    elif is_component and isinstance(child.value, str):
        child.value = {"name": Node(child.value, child.position, child.key_position)}
    return child


def _put(parent: Node, part: str, new: Node) -> str:
    """Set an entry; return the problem, or an empty text."""
    if isinstance(parent.value, list):
        if problem := _no_entry(parent.value, part):
            return problem
        parent.value[int(part)] = new
    elif isinstance(parent.value, dict):
        parent.value[part] = new
    else:
        return _nothing_below(parent)
    return ""


def _no_entry(entries: list[Node], part: str) -> str:
    indices = [str(index) for index in range(len(entries))]
    return "" if part in indices else f"the list has no entry {part!r}{did_you_mean(part, indices)}"


def _nothing_below(parent: Node) -> str:
    return f"{parent.value!r} at {parent.position} is not a section; it has no keys to set"
