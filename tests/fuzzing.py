"""What the fuzz tests share: how many cases, and values that nobody expects.

Each test runs the number of cases that its ``cases`` says, the same ones every time. ``--hypothesis-profile=deep`` runs
125 times as many, other ones every time.
"""

from __future__ import annotations

import copy
import json
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import flapkit
from flapkit.model.plan import PruningPlan
from flapkit.model.surgery import apply_plan_
from flapkit.system.errors import FlapkitError, ModelError

T = TypeVar("T")

USUAL = 100
"""Cases of a test under the default profile: hypothesis's own number."""


def cases(count: int) -> settings:
    """Run so many cases, more under a deeper profile."""
    return settings(max_examples=count * settings().max_examples // USUAL, suppress_health_check=list(HealthCheck))


ODD_TEXT = st.sampled_from(
    [
        "",
        "\0",
        "a\0b",
        "~",
        "~nobody-of-this-name/x",
        "..",
        "../..",
        "/",
        "/etc/passwd",
        "a" * 300,
        "a/" * 3000,
        "\u2028",
        "\ufeff",
        "ß",
        "日本語",
        "\x85",
        "$x$",
        "{{7*7}}",
        "%s%n",
        "-1",
        "1e999",
        "0x10",
        ".nan",
        "null",
        "<script>",
        "trap.py",
        "./trap.py",
        "builtin:",
        "builtin:../x",
        "https://example.org/x",
        "C:\\x",
    ]
)
TEXT = ODD_TEXT | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ODD_NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 7, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 10**30, -(10**30), 0.0, -0.0, 0.5, 1.0, 1e-300, 1e300]
)
NUMBERS = ODD_NUMBERS | st.integers(-(10**6), 10**6) | st.floats(allow_nan=True)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """List the paths of everything in a tree of mappings and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def tampered(draw: st.DrawFn, tree: Any, values: st.SearchStrategy[Any] = VALUES, most: int = 3) -> Any:
    """Change a tree in a few places: replace, remove, repeat or add something."""
    changed = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        known = list(places(changed))
        if not known:
            return copy.deepcopy(draw(values))
        *path, last = draw(st.sampled_from(known))
        parent = changed
        for part in path:
            parent = parent[part]
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "scale"]))
        if how == "remove":
            del parent[last]
        elif how == "add":
            _add(draw, parent, values)
        elif how == "scale" and isinstance(parent[last], (int, float)) and not isinstance(parent[last], bool):
            parent[last] = parent[last] * draw(st.sampled_from([-1, 0, 10**4, 10**9, math.inf]))
        else:
            parent[last] = copy.deepcopy(draw(values))
    return changed


def _add(draw: st.DrawFn, parent: Any, values: st.SearchStrategy[Any]) -> None:
    if isinstance(parent, dict):
        parent[draw(TEXT)] = copy.deepcopy(draw(values))
    else:
        parent.insert(
            draw(st.integers(0, len(parent))), copy.deepcopy(draw(st.sampled_from(parent) if parent else values))
        )


DAMAGE = st.tuples(st.integers(0, 10**6), st.binary(max_size=6), st.sampled_from(["over", "within", "cut"]))
"""Where a file is damaged, by which bytes, and whether they replace, push on or end what is there."""


def damaged(content: bytes, damage: tuple[int, bytes, str]) -> bytes:
    """Damage the content of a file; a place behind its end counts on from its beginning."""
    place, patch, how = damage
    place %= len(content)
    return content[:place] + patch + {"over": content[place + len(patch) :], "within": content[place:], "cut": b""}[how]


def header_of(content: bytes) -> tuple[Any, bytes]:
    """Split a safetensors file into its header and the data behind it."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: Any, data: bytes, length: int | None = None) -> bytes:
    """Join a safetensors file, which may say another length of its header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length % 2**64) + text + data


def to_bytes(content: str | bytes) -> bytes:
    """Encode text, lone surrogates as well."""
    return content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")


@contextmanager
def put_back(path: Path, content: str | bytes | None = None) -> Iterator[None]:
    """Put a file back at the end, or remove it if it was not there; it holds something else meanwhile, if given."""
    before = path.read_bytes() if path.is_file() else None
    try:
        if content is not None:
            path.write_bytes(to_bytes(content))
        yield
    finally:
        path.unlink(missing_ok=True) if before is None else path.write_bytes(before)


def cut_(model: PreTrainedModel, units: int = 0) -> PruningPlan:
    """Cut the last units of every site, or none, and return the plan: the model can be saved as a pruned one."""
    sites = flapkit.sites(model)
    plan = PruningPlan({site.name: tuple(range(site.units - units)) for site in sites})
    apply_plan_(model, sites, plan, {})
    return plan


def judge(folder: Path) -> PreTrainedModel | None:
    """Load a checkpoint and run it, or nothing where it is refused; the error is a ``ModelError`` in words."""
    try:
        model = flapkit.load(folder)
    except FlapkitError as error:
        if not isinstance(error, ModelError) or len(str(error)) < 10:
            raise AssertionError(repr(error)) from error
        return None
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    return model


def read(reader: Callable[[], T], named: str = "") -> T | None:
    """Read something, or nothing where it is refused in words, which name the file."""
    try:
        return reader()
    except FlapkitError as error:
        if named not in str(error) or len(str(error)) < 10:
            raise AssertionError(error) from error
        return None
