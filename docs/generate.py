"""Write the pages that come from the code: ``python docs/generate.py``."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import method
import typer
import yaml
from typer.testing import CliRunner

from flapkit.cli import app
from flapkit.recipe.json_schema import recipe_schema
from flapkit.recipe.schema import KEYS, Recipe
from flapkit.registry import ADAPTER, KINDS, Registry

HERE = Path(__file__).parent


def recipes() -> str:
    """Write the reference of recipes: every section, key, type, default and meaning."""
    schema = Recipe.model_json_schema()
    lines = [
        "# Recipes",
        "",
        "All keys of a recipe, the YAML file that `flapkit run` takes. An unknown key is an error.",
        "`flapkit schema` prints the same as JSON schema for editors. A whole recipe, which `flapkit run demo` runs:",
        "",
        "```yaml",
        (HERE.parent / "recipes" / "demo.yaml").read_text(encoding="utf-8").rstrip(),
        "```",
        "",
    ]
    lines += _table(schema, schema["$defs"])
    for name, section in schema["$defs"].items():
        lines += [f"## {name}", "", section.get("description", "").replace("``", "`"), ""]
        lines += _table(section, schema["$defs"])
    return "\n".join(lines).rstrip() + "\n"


def _table(section: dict[str, Any], sections: dict[str, Any]) -> list[str]:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, entry in section["properties"].items():
        default = "required" if key in section.get("required", ()) else f"`{_yaml(entry.get('default'))}`"
        # The schema leaves out a description that the key's section has as well.
        described = entry if "description" in entry else sections.get(entry.get("$ref", "").rpartition("/")[2], {})
        meaning = described.get("description", "").replace("``", "`").replace("|", "\\|")
        lines.append(f"| `{key}` | {_type(entry)} | {default} | {meaning} |")
    return [*lines, ""]


def _yaml(value: Any) -> str:
    """Write a default as in a recipe, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return str(text).strip().removesuffix("...").strip()


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


def components() -> str:
    """Write the reference of components: all five kinds, with the options of each, from the schema of recipes."""
    registry = Registry.load()
    schema = recipe_schema(registry)
    lines = [_COMPONENTS]
    nested: set[str] = set()
    for kind in KINDS:
        options = _options(schema, KEYS[kind.name])
        lines += [f"## {kind.name.capitalize()}s", "", f"In a recipe: `{KEYS[kind.name]}`. {_MORE[kind.name]}", ""]
        if kind == ADAPTER:
            lines += ["| name | models |", "|---|---|"]
            lines += [f"| `{name}` | {_summary(component)} |" for name, component in registry.names(kind).items()]
            lines += ["", "Every adapter has the same options:", "", *_table(options["auto"], schema["$defs"])]
            assert all(entry["properties"].keys() == options["auto"]["properties"].keys() for entry in options.values())
        else:
            for name, component in registry.names(kind).items():
                lines += [f"### {name}", "", _prose(inspect.getdoc(component) or ""), ""]
                table = (
                    _table(options[name], schema["$defs"])
                    if options[name]["properties"]
                    else ["It has no options.", ""]
                )
                lines += table
        nested |= {name for entry in options.values() for name in _references(entry)}
    lines += ["## Sections of options", ""]
    for name in sorted(nested):
        section = schema["$defs"][name]
        lines += [f"### {name}", "", section.get("description", "").replace("``", "`"), ""]
        lines += _table(section, schema["$defs"])
    return "\n".join(lines).rstrip() + "\n"


_COMPONENTS = """# Components

All components that come with flapkit, with their options. In a recipe, a component is a name, or a section with a name
and options. `flapkit list` shows what is installed, and `flapkit schema` prints the options for editors.

```yaml
metric: wifv
searcher: {name: al_am, attention_power: 1}
compensator: [bias, {name: lora, steps: 500}]
```
"""

_MORE = {
    "metric": "[Metrics](interfaces/metrics.md) compares them.",
    "searcher": "[Searchers](interfaces/searchers.md) compares them.",
    "compensator": "[Compensation](compensation.md) compares them.",
    "adapter": "[Families](families.md) has measurements.",
    "exporter": "[Run the pruned model](run-the-model.md) uses them.",
}
"""Kind -> where its components are explained."""


def _options(schema: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """Map the names of the components of a recipe's key to the schemas of their options, without the name itself."""
    options = {}
    for branch in schema["properties"][key]["oneOf"]:
        if "$ref" in branch:
            entry = schema["$defs"][branch["$ref"].rpartition("/")[2]]
            properties = dict(entry["properties"])
            options[properties.pop("name")["const"]] = {**entry, "properties": properties}
    return options


def _references(entry: Any) -> set[str]:
    """Find the sections that a schema refers to."""
    if isinstance(entry, dict):
        own = {entry["$ref"].rpartition("/")[2]} if "$ref" in entry else set()
        return own.union(*(_references(value) for value in entry.values()))
    return set().union(*(_references(value) for value in entry)) if isinstance(entry, list) else set()


def _summary(component: type) -> str:
    return _prose((inspect.getdoc(component) or "").split("\n\n")[0])


def _prose(docstring: str) -> str:
    """Write a docstring as Markdown: without its sections, formulas as they are."""
    text = re.split(r"\n(?=(?:Args|Attributes|Returns|Raises):\n)", docstring)[0].strip().replace("``", "`")
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_|<\[\]])", r"\\\1", part) for part in parts)


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
    return {"recipes.md": recipes(), "components.md": components(), "cli.md": cli()}


def drawings() -> dict[str, str]:
    """Map the drawn pictures' names to their SVG."""
    return {
        "images/method-light.svg": method.method(method.LIGHT),
        "images/method-dark.svg": method.method(method.DARK),
    }


if __name__ == "__main__":
    for name, text in (pages() | drawings()).items():
        (HERE / name).write_text(text, encoding="utf-8")
