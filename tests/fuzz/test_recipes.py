"""Any text is a recipe that loads, or an error that says where: never a traceback, and never code that is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import RECIPE
from fuzzing import NUMBERS, TEXT, VALUES, cases, tampered, to_bytes
from hypothesis import example, given
from hypothesis import strategies as st
from sweeps import SWEEP

from flapkit.recipe.dump import dump_recipe
from flapkit.recipe.load import LoadedRecipe, load_recipe
from flapkit.registry import Registry
from flapkit.run.sweep.load import load_sweep
from flapkit.system.errors import FlapkitError, RecipeError

WHOLE: dict[str, Any] = {
    **RECIPE,
    "model": {"path": "builtin:tiny-llama", "revision": None, "dtype": "float32"},
    "adapter": {"name": "llama", "unit": "query_head"},
    "calibration": {
        "dataset": "stdlib",
        "samples": 8,
        "length": 32,
        "seed": 1,
        "batch_size": 2,
        "statistics_memory": "4GB",
        "sequential": False,
    },
    "metric": {"name": "random", "seed": 1},
    "searcher": {"name": "al_am", "min_units": 1, "attention_power": 2.0},
    "compensator": ["bias", {"name": "lora", "rank": 4, "steps": 3, "lr": 1e-4}],
    "budget": {"ratio": 0.2, "of": "blocks", "memory": None, "multiple_of": 1, "tensor_parallel": 1},
    "evaluate": {
        "perplexity": [{"dataset": "stdlib", "length": 32, "stride": 16, "windows": 4, "batch_size": "auto"}],
        "zero_shot": {"tasks": ["boolq"], "data_dir": "tasks", "limit": 3},
        "samples": {"prompts": ["Once"], "tokens": 4, "temperature": 0.5},
    },
    "report": {"error_windows": 8, "figures": ["png"]},
    "trainer": {"accelerator": "cpu", "devices": 1, "logger": ["csv"], "gradient_clip_val": 1.0},
    "export": ["hf"],
    "plugins": [],
}
"""A recipe with every section."""

WORDS = "model:¦path: ¦budget:¦ratio: ¦output: ¦plugins: ¦metric: ¦- ¦? ¦: ¦{¦}¦[¦]¦|¦>-¦'¦\"¦#¦---¦...¦%YAML 1.1"
ODDITIES = "&a ¦*a¦<<: *a¦<<: [*a, *a]¦!!binary ¦!x ¦!!int ¦!!set ¦!<tag> ¦0x1F¦0o7¦1_000¦1:30¦1e-4¦.inf¦~¦no"
TAGS = "apply:os.system ['touch ran']¦apply:eval ['1']¦new:trap.Trap []¦name:os.system ¦module:trap "
ESCAPED = ['"\\ud800"', '"\\x00"', '"\\U0010FFFF"', "\n", "\n  ", "\n    ", "\t", "\0", "\ufeff", "\x85"]
PIECES = [*WORDS.split("¦"), *ODDITIES.split("¦"), *ESCAPED, *(f"!!python/object/{tag}" for tag in TAGS.split("¦"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Any:
    """A folder with a plugin that nobody names, and that tells if it is run; the registry is built once."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "base.yaml").write_text(write(WHOLE))
    (folder / "trap.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    registry = Registry.load()
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(Registry, "load", classmethod(lambda cls: registry))
        yield folder
    assert sorted(path.name for path in folder.iterdir()) == ["base.yaml", "recipe.yaml", "trap.py"]


def load(content: str | bytes, *overrides: str, loader: Any = load_recipe) -> Any:
    """Load what was written; whatever is wrong is said line by line, each with its place."""
    Path("recipe.yaml").write_bytes(to_bytes(content))
    try:
        return loader("recipe.yaml", overrides)
    except RecipeError as error:
        for problem in error.problems:
            assert problem.startswith(("recipe.yaml:", "base.yaml:", "/etc/passwd:", "--set ")), problem
        return error
    except FlapkitError as error:
        return error


def names_the_trap(tree: Any) -> bool:
    plugins = tree.get("plugins") if isinstance(tree, dict) else None
    return isinstance(plugins, list) and any(isinstance(each, str) and "trap" in each for each in plugins)


def write(tree: Any) -> str:
    return yaml.dump(tree, Dumper=yaml.SafeDumper, allow_unicode=True, sort_keys=False)


@cases(120)
@given(st.binary(max_size=60) | st.text(max_size=60))
@example(b"\xff\xfe\x00")
@example("\ufeffmodel: 1")
@example(b"model: \x00")
def test_any_bytes(folder, content):
    assert isinstance(load(content), FlapkitError)


@cases(480)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=14).map("".join))
@example("a: &a [x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n")
@example("[" * 5000)
@example("{a: " * 5000)
@example("- " * 5000)
@example("? " * 3000)
@example("a: !!python/object/apply:os.system ['touch ran']")
@example("!!python/object/apply:os.system ['touch ran']")
@example("output: " + "9" * 100_000)
@example("output: 1e" + "9" * 1000)
@example('plugins: ["\\0"]')
@example("plugins: [~nobody-of-this-name/x.py]")
@example("a: 1\n" * 2000)
def test_pieces_of_yaml(folder, content):
    assert isinstance(load(content), FlapkitError)


@cases(80)
@given(VALUES.filter(lambda tree: not names_the_trap(tree)))
def test_any_structure(folder, tree):
    assert isinstance(load(write(tree)), FlapkitError)


@cases(200)
@given(tampered(WHOLE).filter(lambda tree: not names_the_trap(tree)))
@example({**WHOLE, "plugins": ["a\0b"]})
@example({**WHOLE, "searcher": {"name": "plan", "path": "a" * 5000}})
@example({**WHOLE, "calibration": {"dataset": "d", "statistics_memory": "9" * 400 + "GB"}})
def test_a_recipe_that_was_changed(folder, tree):
    loaded = load(write(tree))
    if isinstance(loaded, LoadedRecipe):
        again = load(dump_recipe(loaded))
        assert isinstance(again, LoadedRecipe), again
        assert again.recipe == loaded.recipe or "nan" in repr(loaded.recipe)


KEYS = st.sampled_from(
    ["model.path", "budget.ratio", "metric", "metric.name", "compensator.1.rank", "a..b", "", "export.0"]
)


@cases(100)
@given(KEYS | TEXT, st.sampled_from(PIECES) | TEXT | NUMBERS.map(str))
def test_overrides(folder, key, value):
    if "trap" not in value:
        load(write(WHOLE), f"{key}={value}")


POINTS = {"set": {"budget.of": "mlp"}, "points": [{"metric": "ifv"}], "plot": {"x": "metric"}}


@cases(100)
@given(tampered({**SWEEP, **POINTS}))
@example({**SWEEP, "grid": {f"a{index}": list(range(10)) for index in range(12)}})
@example({**SWEEP, "recipe": "/etc/passwd"})
@example({**SWEEP, "plugins": ["~nobody-of-this-name/x.py"]})
def test_a_sweep_that_was_changed(folder, tree):
    if not names_the_trap(tree):
        load(write(tree), loader=load_sweep)


@cases(80)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=14).map("".join))
def test_a_sweep_of_pieces(folder, content):
    assert isinstance(load(content, loader=load_sweep), FlapkitError)
