"""The declarations of the docs are exact, and caught where a parameter is forgotten."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flapkit.recipe.plugin_files import load_family, load_registry
from flapkit.registry import ADAPTER
from flapkit.system.errors import ModelError
from flapkit.testing import check_adapter

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
CHECKS = ("sliced is masked", "query heads", "counts", "save and load")


@pytest.fixture
def yaml(tmp_path) -> Path:
    (text,) = re.findall(r"```yaml\n(# glm\.yaml.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "glm.yaml").write_text(text)
    return tmp_path / "glm.yaml"


def test_the_yaml_is_exact(yaml):
    check_adapter(load_family(yaml), forms=["default", "one key/value head"], checks=CHECKS)
    assert load_registry([yaml]).origin(ADAPTER, "my_glm") == str(yaml)


def test_the_python_is_exact(tmp_path):
    (text,) = re.findall(r"```python\n(from flapkit import hookimpl.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "glm.py").write_text(text)
    adapter = load_registry([tmp_path / "glm.py"]).create(ADAPTER, "my_glm", {"unit": "query_head"})
    check_adapter(adapter, forms=["default"], checks=CHECKS)


def test_the_readme_has_the_same_declaration(yaml, tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(# glm\.yaml.*?)```", readme, flags=re.DOTALL)
    (tmp_path / "readme.yaml").write_text(text)
    assert load_family(tmp_path / "readme.yaml") == load_family(yaml)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_the_example_of_the_interface_is_exact_in_every_form(tmp_path):
    page = (ROOT / "docs" / "interfaces" / "adapters.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "my_ernie.py").write_text(text)
    check_adapter(load_registry([tmp_path / "my_ernie.py"]).create(ADAPTER, "my_ernie"), checks=CHECKS)


def test_a_forgotten_parameter_is_named(yaml):
    yaml.write_text(yaml.read_text().replace("{gate_up_proj: i+i}", "{}"))
    (said,) = re.findall(r"```\n(layers\.0\.mlp: .*?)\n```", PAGE)
    with pytest.raises(ModelError) as caught:
        check_adapter(load_family(yaml), forms=["default"], checks=["sliced is masked"])
    assert said.replace("name mlp", "name model.layers.0.mlp") in str(caught.value)
