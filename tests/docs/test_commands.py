"""Every recipe, part of a recipe and command line of a page is one: it validates, or parses, and is not run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from conftest import RECIPE

from flapkit.cli import app
from flapkit.recipe.load import load_recipe
from flapkit.run.sweep.load import load_sweep

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "plugin-template" not in path.parts),
]
GENERATED = ("cli.md", "recipes.md")
"""Pages that show what commands print."""

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
STATEMENT = re.compile(r"^(?=\w)", flags=re.MULTILINE)


def blocks(page: Path, *languages: str) -> list[str]:
    """List the snippets of a page in some languages."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [code for language, code in found if language in languages]


def variants(code: str) -> list[dict[str, object]]:
    """Read a snippet of YAML; a key that stands twice shows two ways, which are one after the other."""
    ways: list[dict[str, object]] = [{}]
    for statement in STATEMENT.split(code):
        entries = yaml.safe_load(statement) or {}
        if entries.keys() & ways[-1].keys():
            ways.append({})
        ways[-1] |= entries
    return ways


def yaml_snippets() -> list[tuple[str, dict[str, object]]]:
    """List what the pages' snippets of YAML say: page -> keys."""
    found = []
    for page in PAGES:
        for code in blocks(page, "yaml"):
            # A part below a key begins with spaces.
            whole = f"evaluate:\n{code}" if code.startswith(" ") else code
            found += [(page.name, way) for way in variants(whole)]
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with the files that snippets name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    for page in PAGES:
        for code in blocks(page, "python", "yaml"):
            if name := re.match(r"# (\w+\.(?:py|yaml))\b", code):
                (tmp_path / name[1]).write_text(code)
    return tmp_path


def test_yaml_is_valid(folder):
    checked = 0
    for page, says in yaml_snippets():
        if "blocks" in says:
            continue  # A declaration, which test_snippets loads.
        path = folder / "snippet.yaml"
        if "recipe" in says:
            path.write_text(yaml.safe_dump(says))
            load_sweep(path)
        else:
            path.write_text(yaml.safe_dump({**RECIPE, **says}))
            load_recipe(path)
        checked += 1
        assert page
    assert checked > 15


def command_lines() -> list[str]:
    """List the pages' calls of flapkit, whatever starts them."""
    found = []
    for page in PAGES:
        if page.name in GENERATED:
            continue
        for code in blocks(page, "", "bash", "sh"):
            for line in code.replace("\\\n", " ").splitlines():
                call = re.match(r"^(?:\$ |torchrun .* -m |srun .* )?flapkit (.*)", line)
                if call:
                    found.append(call[1])
    return found


@pytest.mark.parametrize("line", command_lines())
def test_commands_parse(folder, line):
    group = typer.main.get_command(app)
    words = shlex.split(line, comments=True)
    with group.make_context("flapkit", list(words), resilient_parsing=True) as context:
        name, command, rest = group.resolve_command(context, words)
        parsed = command.make_context(name, rest, parent=context)
    overrides = parsed.params.get("overrides") or []
    recipe = str(parsed.params.get("recipe"))
    shipped = [path for path in (ROOT / recipe, ROOT / "recipes" / f"{recipe}.yaml") if path.is_file()]
    if name in ("run", "check") and shipped:
        # Beside the files that the command names.
        (folder / "recipe.yaml").write_text(shipped[0].read_text())
        load_recipe(folder / "recipe.yaml", overrides)
