"""Every recipe, part of a recipe and command line of a page is one: it validates, or parses, and is not run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from blocks import OUTLINES, PLUGINS, SHOWN, blocks
from conftest import RECIPE

from flapkit.cli import app
from flapkit.recipe.load import load_recipe
from flapkit.run.sweep.load import load_sweep

ROOT = Path(__file__).parents[2]

STATEMENT = re.compile(r"^(?=\w)", flags=re.MULTILINE)


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
    for block in blocks():
        if block.language == "yaml":
            # A part below a key begins with spaces.
            whole = f"evaluate:\n{block.code}" if block.code.startswith(" ") else block.code
            found += [(block.page, way) for way in variants(whole)]
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with the files that snippets name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    for block in blocks():
        if block.language in ("python", "yaml") and (name := re.match(r"# (\w+\.(?:py|yaml))\b", block.code)):
            (tmp_path / name[1]).write_text(block.code)
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


def command_lines(program: str) -> list[str]:
    """List the arguments of the pages' calls of a program, whatever starts it."""
    commands = [command for block in blocks() for command in block.commands]
    return list(dict.fromkeys(arguments for name, arguments in commands if name == program))


@pytest.mark.parametrize("line", command_lines("flapkit"))
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
        load_recipe(shipped[0], overrides)


@pytest.mark.parametrize("line", command_lines("make"))
def test_make_has_the_target(line):
    target = shlex.split(line, comments=True)[0]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("line", command_lines("python"))
def test_python_has_the_script(line):
    words = line.split()
    scripts = [word for word in words if word.endswith(".py") and "/" in word]
    written = {name[1] for block in blocks() if (name := re.match(r"# (\w+\.py)\b", block.code))}
    assert scripts or words[0] in {"-c", "-m"} | written
    assert all((ROOT / script).is_file() for script in scripts)


def test_python_on_the_command_line_compiles():
    codes = [
        code for block in blocks() for code in re.findall(r'^python -c "(.*?)"', block.code, re.DOTALL | re.MULTILINE)
    ]
    assert codes
    for code in codes:
        compile(code, "python -c", "exec")


def test_json_is_valid():
    texts = [block.code for block in blocks() if block.language == "json"]
    assert all(json.loads(line) for text in texts for line in text.splitlines())


def test_every_block_is_tested_or_excepted():
    found = list(blocks())
    unknown = [block.place for block in found if not block.test]
    assert not unknown, "say in tests/blocks.py what a test does with these blocks"
    gone = [place for place in (*SHOWN, *PLUGINS, *OUTLINES) if not any(b.place.startswith(place) for b in found)]
    assert not gone, "blocks that tests/blocks.py names are gone"
