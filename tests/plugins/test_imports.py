"""Plugins of the repository keep to what the plugins of others may import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parents[2] / "plugins"
ALLOWED = {"flapkit.interfaces", "flapkit.testing"}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = {f"flapkit.{name.name}" for name in node.names}
            found |= names if node.module == "flapkit" else {node.module}
    return found


@pytest.mark.parametrize("path", sorted(PLUGINS.rglob("*.py")), ids=lambda path: str(path.relative_to(PLUGINS)))
def test_a_plugin_imports_the_interfaces_and_its_own_package(path):
    own = path.relative_to(PLUGINS).parts[0]
    ours = {name for name in imported(path) if name.split(".")[0].startswith("flapkit")}
    other = {name for name in ours - ALLOWED - {"flapkit.hookimpl"} if name.split(".")[0] != own}
    assert not other
