from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flapkit.recipe.json_schema import recipe_schema
from flapkit.recipe.plugin_files import load_registry
from flapkit.registry import Registry
from flapkit.system.errors import PluginError

PLUGIN = """\
from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from flapkit import hookimpl
from flapkit.pruning.components import ImportanceMetric


@dataclass(frozen=True)
class Mine(ImportanceMetric):
    \"\"\"What I like.\"\"\"

    name = "mine"

    power: Annotated[int, Field(ge=1, description="a power")]

    def score(self, site, stats, weight):
        return weight


@hookimpl
def flapkit_metrics():
    return [Mine]
"""


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return recipe_schema(Registry.load())


def sections(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        # Without properties it is a mapping of names of the user's.
        if part.get("type") == "object" and "properties" in part:
            yield part
        for inner in part.values():
            yield from sections(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from sections(inner)


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if "$ref" in part:
            yield part["$ref"]
        for inner in part.values():
            yield from references(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from references(inner)


def test_its_draft_and_required_keys(schema: dict[str, Any]) -> None:
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["required"] == ["model", "calibration", "budget", "output"]
    assert json.loads(json.dumps(schema)) == schema


def test_no_section_takes_unknown_keys_and_every_key_is_described(schema: dict[str, Any]) -> None:
    found = list(sections(schema))
    assert len(found) > 10
    for section in found:
        assert section["additionalProperties"] is False, section
        for name, field in section["properties"].items():
            assert "description" in field or "$ref" in field, (section.get("title"), name)


def test_every_reference_leads_somewhere(schema: dict[str, Any]) -> None:
    found = set(references(schema))
    assert found == {f"#/$defs/{name}" for name in schema["$defs"]}


def test_a_component_is_a_name_or_a_section_of_its_options(schema: dict[str, Any]) -> None:
    searcher = schema["properties"]["searcher"]
    names, *branches = searcher["oneOf"]
    assert searcher["default"] == "al_am"
    assert "al_am" in names["enum"]
    named = {schema["$defs"][branch["$ref"].rpartition("/")[2]]["properties"]["name"]["const"] for branch in branches}
    assert named == set(names["enum"])
    al_am = schema["$defs"]["ALAM"]
    assert al_am["required"] == ["name"]
    assert al_am["properties"]["min_units"]["minimum"] == 0
    assert al_am["properties"]["min_units"]["default"] == 1
    assert al_am["properties"]["min_units"]["description"].startswith("Units")


def test_the_adapter_may_be_null(schema: dict[str, Any]) -> None:
    assert {"type": "null"} in schema["properties"]["adapter"]["oneOf"]
    assert {"type": "null"} not in schema["properties"]["metric"]["oneOf"]


def test_a_plugins_options_are_in_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    schema = recipe_schema(load_registry([tmp_path / "mine.py"]))
    assert schema["$defs"]["Mine"]["required"] == ["name", "power"]
    assert schema["$defs"]["Mine"]["description"] == "What I like."
    assert "mine" in schema["properties"]["metric"]["oneOf"][0]["enum"]


def test_an_option_that_json_cannot_express(tmp_path: Path) -> None:
    source = PLUGIN.replace("import Annotated", "import Annotated, Callable").replace("int, F", "Callable[[], int], F")
    (tmp_path / "mine.py").write_text(source.replace("ge=1, ", ""))
    with pytest.raises(PluginError, match="an option of a component has no JSON schema"):
        recipe_schema(load_registry([tmp_path / "mine.py"]))


def test_compensators_may_be_a_list(schema: dict[str, Any]) -> None:
    *single, several = schema["properties"]["compensator"]["oneOf"]
    assert several == {"type": "array", "items": {"oneOf": single}}
    assert schema["properties"]["compensator"]["default"] == "bias"
