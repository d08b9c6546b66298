"""YAML as a tree in which every value and key has its position.

Scalars follow the core schema of YAML 1.2: ``1e-4`` is a number, ``no`` and ``on`` are text. Repeated keys, anchors,
aliases, merge keys, tags and several documents are rejected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

Scalar: TypeAlias = "str | int | float | bool | None"

INTEGER = re.compile(r"[-+]?[0-9]{1,100}|0o[0-7]{1,100}|0x[0-9a-fA-F]{1,100}")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLEANS = {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_MAX_DEPTH = 20
LARGEST_INTEGER = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Position:
    """A position in a recipe.

    Args:
        source: the file as the user named it, or the ``--set`` option.
        line: counted from 1; 0 for an option.
        column: counted from 1, in characters.
    """

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem of a recipe.

    Args:
        position: where it is.
        key: the dotted key; empty for the document as a whole.
        what: what is wrong, and what to do.
    """

    position: Position
    key: str
    what: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.position), self.key, self.what) if part)


@dataclass(slots=True)
class Node:
    """A value and its position.

    Args:
        value: a scalar, a list of nodes, or nodes by key.
        position: the start of the value.
        key_position: the start of its key; in a list, the start of the value.
    """

    value: Scalar | list[Node] | dict[str, Node]
    position: Position
    key_position: Position

    @property
    def folder(self) -> Path:
        """The base of relative paths in it: the folder of its file, or the current directory for an option."""
        return Path(self.position.source).parent if self.position.line else Path()

    def child(self, part: str | int) -> Node | None:
        """Return an entry of a section by its key, or of a list by its index; None where there is none."""
        if isinstance(self.value, dict):
            return self.value.get(str(part))
        if isinstance(self.value, list) and isinstance(part, int) and 0 <= part < len(self.value):
            return self.value[part]
        return None

    def plain(self) -> Any:
        """Return the value without positions."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def parse(text: str, locate: Callable[[int, int], Position]) -> tuple[Node | None, list[Problem]]:
    """Read one YAML document.

    Args:
        text: the document.
        locate: makes a position from a line and a column, both counted from 1.

    Returns:
        The tree, or None if the text is empty or not YAML; and the problems of the document's form.
    """
    reader = _Reader(text, locate)
    try:
        return reader.document(), reader.problems
    except yaml.reader.ReaderError as error:
        line, column = text.count("\n", 0, error.position) + 1, error.position - text.rfind("\n", 0, error.position)
        return None, [
            Problem(locate(line, column), "", f"not YAML: the character U+{error.character:04X} is not allowed")
        ]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        start = f"(which starts at {_at(error.context_mark, locate)})" if error.context_mark else None
        what = " ".join(part for part in (error.context, start, error.problem) if part)
        return None, [Problem(_at(mark, locate), "", f"not YAML: {what}")]
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        return None, [Problem(locate(1, 1), "", f"not YAML: {error}")]


def _at(mark: Any, locate: Callable[[int, int], Position]) -> Position:
    return locate(mark.line + 1, mark.column + 1) if mark else locate(1, 1)


class _Reader:
    """Builds the tree from YAML's events, and collects the problems."""

    def __init__(self, text: str, locate: Callable[[int, int], Position]) -> None:
        self.problems: list[Problem] = []
        self._events: Iterator[Any] = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        self._locate = locate

    def document(self) -> Node | None:
        """Read the only document; None where the text is empty."""
        root = None
        documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents == 2:
                    self._refuse(event, "", "a second document starts here; a recipe is one document")
            elif not isinstance(event, (yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentEndEvent)):
                node = self._node(event, "", 0)
                root = root or node
        return root

    def _node(self, event: Any, key: str, depth: int) -> Node:
        position = self._position(event)
        node = Node(None, position, position)
        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, key, f"aliases such as *{event.anchor} are not supported; write the value out")
            return node
        if event.anchor is not None:
            self._refuse(event, key, f"anchors such as &{event.anchor} are not supported; remove it")
        if event.tag is not None:
            self._refuse(event, key, f"tags such as {event.tag} are not supported; remove it")
        if depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested over {_MAX_DEPTH} levels deep", problem_mark=event.start_mark)
        if isinstance(event, yaml.MappingStartEvent):
            node.value = self._mapping(key, depth)
        elif isinstance(event, yaml.SequenceStartEvent):
            node.value = self._sequence(key, depth)
        else:
            node.value = self._scalar(event, key)
        return node

    def _mapping(self, parent: str, depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            name = event.value if isinstance(event, yaml.ScalarEvent) else None
            key = ".".join(part for part in (parent, name) if part)
            self._node(event, key, depth + 1)
            node = self._node(next(self._events), key, depth + 1)
            node.key_position = self._position(event)
            if name is None:
                self._refuse(event, parent, "a key must be a name")
            elif name == "<<":
                self._refuse(event, parent, "merge keys (<<) are not supported; write the values out")
            elif name in entries:
                self._refuse(event, key, f"repeated key; first used at {entries[name].key_position}")
            else:
                entries[name] = node
        return entries

    def _sequence(self, parent: str, depth: int) -> list[Node]:
        entries: list[Node] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            entries.append(self._node(event, f"{parent}.{len(entries)}", depth + 1))
        return entries

    def _scalar(self, event: Any, key: str) -> Scalar:
        text: str = event.value
        if any("\ud800" <= character <= "\udfff" for character in text):
            self._refuse(event, key, "half of a surrogate pair is not a character")
            return None
        value = resolve(text) if event.style is None else text
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            self._refuse(event, key, f"whole numbers beyond {LARGEST_INTEGER} are not supported")
            return None
        return value

    def _position(self, event: Any) -> Position:
        return _at(event.start_mark, self._locate)

    def _refuse(self, event: Any, key: str, what: str) -> None:
        self.problems.append(Problem(self._position(event), key, what))


def resolve(text: str) -> Scalar:
    """Read a plain scalar by the core schema of YAML 1.2."""
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if INTEGER.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if FLOAT.fullmatch(text):
        return _float(text.lower())
    return text


def _float(text: str) -> float:
    return math.nan if text == ".nan" else float(text.replace(".inf", "inf"))
