"""Read JSON of unknown origin; every defect raises the same kind of error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapkit.system.errors import InputError

if TYPE_CHECKING:
    from pydantic import ValidationError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MAX_DEPTH = 100


def parse_json(text: str) -> Any:
    """Read JSON.

    Raises:
        ValueError: the text is not JSON, is nested too deep, or holds a repeated key, too long a number or half of a
            surrogate pair.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if _SURROGATE.search(text):
            # Half of a surrogate pair is not a character: it can be neither printed nor tokenised.
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if text.count("[") + text.count("{") > _MAX_DEPTH and _depth(value) > _MAX_DEPTH:
        raise ValueError(f"nested over {_MAX_DEPTH} levels deep")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"repeated key {next(name for name in names if names.count(name) > 1)!r}")
    return entries


def _depth(value: Any) -> int:
    """Count the nested levels of objects and lists, without recursion."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def first_problem(error: ValidationError, *within: str) -> str:
    """Write the first problem of data that pydantic refused: its key, below others if there are any, and what it is."""
    problem = error.errors()[0]
    key = ".".join(map(str, (*within, *problem["loc"]))) or "content"
    return f"{key}: {problem['msg']}"


def read_object(path: Path, raises: type[InputError] = InputError) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: the file.
        raises: the error that is raised if the file cannot be read.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise raises(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise raises(f"{path}: is damaged: {error}") from error
    if not isinstance(value, dict):
        raise raises(f"{path}: is damaged: expected an object, found a {type(value).__name__}")
    return value
