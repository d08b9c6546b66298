"""Write the pages that come from the code: ``python docs/generate.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from flapkit.cli import app
from flapkit.recipe.schema import Recipe

HERE = Path(__file__).parent


def recipes() -> str:
    """Write the reference of recipes: every section, key, type, default and meaning."""
    schema = Recipe.model_json_schema()
    lines = ["# Recipes", "", schema["description"], ""]
    lines += ["An unknown key is an error. `flapkit schema` prints this as JSON schema for editors.", ""]
    lines += _table(schema)
    for name, section in schema["$defs"].items():
        lines += [f"## {name}", "", section.get("description", "").replace("``", "`"), "", *_table(section)]
    return "\n".join(lines).rstrip() + "\n"


def _table(section: dict[str, Any]) -> list[str]:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, entry in section["properties"].items():
        default = "required" if key in section.get("required", ()) else f"`{entry.get('default')}`"
        meaning = entry.get("description", "").replace("|", "\\|")
        lines.append(f"| `{key}` | {_type(entry)} | {default} | {meaning} |")
    return [*lines, ""]


def _type(entry: dict[str, Any]) -> str:
    if "$ref" in entry:
        name = entry["$ref"].split("/")[-1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in entry:
        return " or ".join(_type(each) for each in entry["anyOf"])
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "const" in entry:
        return f"`{entry['const']}`"
    if entry.get("type") == "array":
        return f"list of {_type(entry['items'])}"
    return str(entry.get("type", "any"))


def cli() -> str:
    """Write every command's own help."""
    commands = sorted(typer.main.get_group(app).commands)
    lines = [
        "# Command line",
        "",
        "Exit codes: 0 done, 1 the run failed, 2 bad input, 130 stopped by Ctrl-C, 143 by SIGTERM.",
        "",
    ]
    for command in commands:
        lines += [f"## flapkit {command}", "", "```", _help(command), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _help(command: str) -> str:
    environment = {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}
    result = CliRunner(env=environment).invoke(app, [command, "--help"], prog_name="flapkit", terminal_width=100)
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines())


def pages() -> dict[str, str]:
    """Map the generated pages' names to their text."""
    return {"recipes.md": recipes(), "cli.md": cli()}


if __name__ == "__main__":
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")
