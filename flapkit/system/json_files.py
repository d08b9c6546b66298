"""JSON that somebody else wrote: whatever is wrong with it is one kind of error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from flapkit.system.errors import InputError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_DEEPEST = 100


def parse_json(text: str) -> Any:
    """Read JSON.

    Raises:
        ValueError: it is none, nested too deep, or holds a repeated key, a number too long or text that is none.
    """
    try:
        found = json.loads(text, object_pairs_hook=_object)
        if _SURROGATE.search(text):
            # Half of a pair is no character: nothing can print it, and no tokenizer takes it.
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if text.count("[") + text.count("{") > _DEEPEST and _depth(found) > _DEEPEST:
        raise ValueError(f"nested over {_DEEPEST} levels deep")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"repeated key {next(name for name in names if names.count(name) > 1)!r}")
    return found


def _depth(value: Any) -> int:
    """Count the levels of objects and lists, without recursion."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, (dict, list))]:
        depth += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return depth


def read_object(path: Path, raises: type[InputError] = InputError) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: the file.
        raises: what is raised otherwise.
    """
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise raises(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise raises(f"{path}: is damaged: {error}") from error
    if not isinstance(found, dict):
        raise raises(f"{path}: is damaged: expected an object, found a {type(found).__name__}")
    return found
