"""Nothing that a reader may use is missing from the reference."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule

import flapkit.execution.lightning as lightning_package
from flapkit.recipe.schema import Recipe
from flapkit.registry import ADAPTER, KINDS, Registry

DOCS = Path(__file__).parents[2] / "docs"


def documented(page: str) -> set[str]:
    return set(re.findall(r"^::: (\S+)$", (DOCS / "reference" / page).read_text(encoding="utf-8"), flags=re.MULTILINE))


@pytest.mark.parametrize("module", ["flapkit", "flapkit.interfaces"])
def test_every_public_name(module):
    names = set(importlib.import_module(module).__all__) - {"__version__"}
    assert documented(f"{module.rpartition('.')[2]}.md") == {f"{module}.{name}" for name in names}


def test_every_lightning_class():
    found = set()
    for info in pkgutil.iter_modules(lightning_package.__path__):
        module = importlib.import_module(f"{lightning_package.__name__}.{info.name}")
        for name, value in vars(module).items():
            public = isinstance(value, type) and value.__module__ == module.__name__ and not name.startswith("_")
            if public and issubclass(value, (Callback, LightningModule, LightningDataModule)):
                found.add(f"{module.__name__}.{name}")
    assert found <= documented("lightning.md")


def test_every_component_and_its_options():
    page = (DOCS / "components.md").read_text(encoding="utf-8")
    parts = re.split(r"^## ", page, flags=re.MULTILINE)
    registry = Registry.load()
    for kind in KINDS:
        (part,) = (part for part in parts if part.lower().startswith(f"{kind.name}s\n"))
        sections = {text.partition("\n")[0]: text for text in re.split(r"^### ", part, flags=re.MULTILINE)}
        for name, component in registry.names(kind).items():
            section = part if kind == ADAPTER else sections[name]
            assert name in section
            for field in dataclasses.fields(component):
                assert f"| `{field.name}` |" in section, f"{kind.name} {name}: {field.name} is missing"


def test_every_key_of_recipes():
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    schema = Recipe.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        assert all(f"| `{key}` |" in page for key in section["properties"])


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        """Reads mkdocs' own tags as they stand."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    nav = yaml.load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]
    named = set(re.findall(r"[\w/-]+\.md", str(nav)))
    assert named == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if "plugin-template" not in page.parts}
