"""The generated pages are those of today's code, and the examples are plugins that load."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from flapkit.checkpoint.export import export
from flapkit.recipe.plugin_files import load_registry
from flapkit.registry import EXPORTER, KINDS, METRIC

DOCS = Path(__file__).parents[2] / "docs"
NAMES = {
    "metrics": "input_power",
    "searchers": "early_first",
    "compensators": "part_of_bias",
    "adapters": "my_ernie",
    "exporters": "numpy",
}


def script(name: str) -> ModuleType:
    """Import a script of the docs."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    generate = script("generate")
    for name, text in (generate.pages() | generate.drawings()).items():
        assert (DOCS / name).read_text(encoding="utf-8") == text, f"run `python docs/generate.py`: {name} is old"


def test_what_belongs_together_stays_on_one_line():
    code = "<code>a 20 % b</code><pre><code>x: 20 %\ny: 54.8 / 11.4</code></pre>"
    html = f"<p>20 % of 54.8 / 11.4 ± 4, and / or 5.5 %, <code>--set</code></p>{code}"
    expected = f"<p>20~% of 54.8~/~11.4~±~4, and / or 5.5~%, <code class='name'>--set</code></p>{code}"
    expected = expected.replace("~", "\N{NO-BREAK SPACE}").replace("'", '"')
    assert script("hooks").on_page_content(html, page=None) == expected


@pytest.mark.parametrize("page", NAMES)
def test_examples_are_plugins(page, tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "interfaces" / f"{page}.md").read_text(), flags=re.DOTALL)
    (tmp_path / f"{page}.py").write_text(example)
    registry = load_registry([tmp_path / f"{page}.py"])
    (kind,) = (kind for kind in KINDS if kind.hook == f"flapkit_{page}")
    registry.create(kind, NAMES[page])


def test_the_exporter_example_exports(pruned_folder, tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "interfaces" / "exporters.md").read_text(), flags=re.DOTALL)
    (tmp_path / "mine.py").write_text(example)
    registry = load_registry([tmp_path / "mine.py"])
    assert export(pruned_folder, registry.create(EXPORTER, "numpy"), tmp_path / "out.npz").difference == 0


def test_the_readme_metric_is_a_plugin(tmp_path):
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(# my_metric\.py.*?)```", readme, flags=re.DOTALL)
    (tmp_path / "my_metric.py").write_text(example)
    load_registry([tmp_path / "my_metric.py"]).create(METRIC, "my_magnitude")
