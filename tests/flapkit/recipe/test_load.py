from __future__ import annotations

from pathlib import Path

import pytest

import flapkit
from flapkit.recipe.dump import dump_recipe
from flapkit.recipe.files import find_recipe, shipped_recipes
from flapkit.recipe.load import LoadedRecipe, load_recipe
from flapkit.recipe.schema import ComponentSpec
from flapkit.system.errors import InputError, RecipeError

GOOD = """\
model: {path: somewhere}
calibration: {dataset: stdlib}
budget: {ratio: 0.2}
output: runs/x
"""

PLUGIN = """\
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from flapkit import hookimpl
from flapkit.interfaces import BudgetError
from flapkit.pruning.components import ImportanceMetric


@dataclass(frozen=True)
class Inner:
    depth: int = 1


@dataclass(frozen=True)
class Mine(ImportanceMetric):
    name = "mine"

    power: Annotated[int, Field(ge=1, description="a power")] = 1
    scale: float = 1.0
    mode: Literal["sum", "mean"] = "sum"
    file: Path | None = None
    inner: Inner = field(default_factory=Inner)
    parts: tuple[float, ...] = ()

    def __post_init__(self):
        if self.scale == 13:
            raise ValueError("13 is unlucky")
        if self.scale == 14:
            raise BudgetError("14 is too much")

    def score(self, site, stats, weight):
        return weight.abs().sum(dim=0).view(site.units, -1)


@hookimpl
def flapkit_metrics():
    return [Mine]
"""


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str, *overrides: str) -> LoadedRecipe:
    return load_recipe(write(folder, text), overrides)


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        load(folder, text, *overrides)
    assert str(raised.value) == "\n".join(raised.value.problems)
    return [problem.replace(f"{folder}/", "") for problem in raised.value.problems]


def replaced(line: int, text: str) -> str:
    """Return the good recipe with another line (counted from 1)."""
    lines = GOOD.splitlines()
    lines[line - 1] = text
    return "\n".join(lines) + "\n"


def test_the_smallest_recipe(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD)
    assert loaded.path == tmp_path / "r.yaml"
    assert (loaded.metric.name, loaded.searcher.name, loaded.compensators[0].name) == ("wifv", "al_am", "bias")
    assert loaded.adapter is not None
    assert loaded.adapter.name == "auto"
    assert loaded.recipe.calibration.samples == 1024
    assert loaded.recipe.budget.of == "blocks"
    assert loaded.recipe.evaluate.perplexity == ()
    assert loaded.recipe.trainer.devices == 1
    assert loaded.recipe.trainer.precision is None


def test_components_with_options(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD + "searcher: {name: al_am, min_units: 3, attention_power: 1}\nadapter: vicuna\n")
    assert (loaded.searcher.min_units, loaded.searcher.attention_power) == (3, 1.0)  # type: ignore[attr-defined]
    assert loaded.adapter is not None
    assert loaded.adapter.name == "vicuna"


def test_options_of_the_resolved_recipe_are_written_out(tmp_path: Path) -> None:
    spec = load(tmp_path, GOOD).recipe.searcher
    assert spec == ComponentSpec(name="al_am", min_units=1, attention_power=2.0)
    assert spec.options == {"min_units": 1, "attention_power": 2.0}


@pytest.mark.parametrize(
    ("line", "text", "problem"),
    [
        (1, "model: {path: x, dtyp: auto}", "r.yaml:1:18: model.dtyp: unknown key; did you mean 'dtype'?"),
        (1, "model: {path: x, dtype: float61}", "r.yaml:1:25: model.dtype: expected 'auto', 'float32', 'float16' or"),
        (1, "model: {path: x, dtype: float61}", "got 'float61'; did you mean 'float16'?"),
        (1, "model: {path: 5}", "r.yaml:1:15: model.path: expected text, got 5"),
        (1, "model: {path: ''}", "r.yaml:1:15: model.path: expected text that is not empty, got ''"),
        (1, "model: {}", "r.yaml:1:8: model.path: required, but missing"),
        (1, "model: x", "r.yaml:1:8: model: expected a section of keys, got 'x'"),
        (1, "model: [x]", "r.yaml:1:8: model: expected a section of keys, got a list"),
        (1, "model:", "r.yaml:1:7: model: expected a section of keys, got null"),
        (1, "modle: {path: x}", "r.yaml:1:1: modle: unknown key; did you mean 'model'?"),
        (1, "", "r.yaml:2:1: model: required, but missing"),
        (2, "calibration: {dataset: x, samples: 0}", "2:36: calibration.samples: expected at least 1, got 0"),
        (2, "calibration: {dataset: x, samples: 1.0}", "calibration.samples: expected a whole number, got 1.0"),
        (2, "calibration: {dataset: x, samples: 1e3}", "calibration.samples: expected a whole number, got 1000.0"),
        (2, "calibration: {dataset: x, samples: '8'}", "calibration.samples: expected a whole number, got '8'"),
        (2, "calibration: {dataset: x, samples: true}", "calibration.samples: expected a whole number, got true"),
        (2, "calibration: {dataset: x, length: 1}", "calibration.length: expected at least 2, got 1"),
        (2, "calibration: {dataset: x, seed: -1}", "calibration.seed: expected at least 0, got -1"),
        (2, "calibration: {dataset: x, seed: 4294967296}", "calibration.seed: expected at most 4294967295"),
        (2, "calibration: {}", "r.yaml:2:14: calibration.dataset: required, but missing"),
        (2, "calibration: {dataset: null}", "r.yaml:2:24: calibration.dataset: required, but missing"),
        (2, "calibration: {datset: x}", "calibration.datset: unknown key; did you mean 'dataset'?"),
        (2, "calibration: {mix: []}", "r.yaml:2:14: calibration.dataset: required, but missing"),
        (2, "calibration: {mix: [{share: 1}]}", "r.yaml:2:21: calibration.mix.0.dataset: required, but missing"),
        (2, "calibration: {mix: [{dataset: 1}]}", "r.yaml:2:31: calibration.mix.0.dataset: expected text, got 1"),
        (2, "calibration: {mix: [{dataset: x, share: 0}]}", "2:41: calibration.mix.0.share: expected over 0.0, got 0"),
        (
            2,
            "calibration: {mix: [{dataset: x}], dataset: y}",
            "2:45: calibration.dataset: expected either `dataset` or",
        ),
        (2, "calibration: {mix: [{dataset: x}], split: y}", "2:43: calibration.split: expected no `split` beside"),
        (
            2,
            "calibration: {mix: [{dataset: x}, {dataset: y}], samples: 1}",
            "r.yaml:2:59: calibration.samples: calibration.mix.1 gets none of 1 window; increase its share, or the",
        ),
        (
            3,
            "budget: {ratio: 0.2, of: block}",
            "r.yaml:3:26: budget.of: expected 'blocks', 'model', ",
        ),
        (
            3,
            "budget: {ratoi: 0.2}",
            "r.yaml:3:10: budget.ratoi: unknown key; did you mean 'ratio'? (known:",
        ),
        (3, "budget: {}", "r.yaml:3:9: budget: expected one of ratio, params, active_params, memory"),
        (3, "budget: {ratio: null}", "r.yaml:3:9: budget: expected one of ratio, params, active_params, memory"),
        (3, "budget: {ratio: 0.2, params: 9M}", "got ratio and params; remove all but one, or set it to null"),
        (3, "budget: {params: 0}", "r.yaml:3:18: budget.params: 0 is not a number of parameters; give one with K, M"),
        (3, "budget: {params: 9MB}", "budget.params: '9MB' is not a number of parameters; give one with K, M, B or T"),
        (3, "budget: {memory: 200}", "r.yaml:3:18: budget.memory: 200 is not a size of weights; give a number with"),
        (3, "budget: {memory: 9Mo}", "'9Mo' is not a size of weights; give a number with KB, MB, GB, TB, KiB, MiB"),
        (3, "budget: {kv_cache: 50}", "50 is not a ratio; give the fraction of the dense model's to leave, between 0"),
        (3, "budget: {params: 9M, dtype: bfloat16}", "`dtype` goes with `memory`, not with `params`; remove it"),
        (3, "budget: {kv_cache: 0.5, of: model}", "`of` goes with `ratio`, not with `kv_cache`; remove it"),
        (4, "output: 5", "r.yaml:4:9: output: expected text, got 5"),
        (4, "output: a\nmetric: wivf", "r.yaml:5:9: metric: unknown metric 'wivf'; did you mean 'wifv'? (known:"),
        (4, "output: a\nmetric: {name: wivf}", "r.yaml:5:16: metric: unknown metric 'wivf'"),
        (4, "output: a\nmetric: {power: 2}", "r.yaml:5:9: metric.name: required, but missing"),
        (4, "output: a\nmetric: 5", "r.yaml:5:9: metric: expected a name, or a section with a name and options"),
        (4, "output: a\nmetric: {name: 5}", "r.yaml:5:16: metric.name: expected text, got 5"),
        (4, "output: a\nmetric: {name: wifv, p: 5}", "r.yaml:5:22: metric.p: unknown key (known: none)"),
        (4, "output: a\nadapter: lama", "r.yaml:5:10: adapter: unknown adapter 'lama'; did you mean 'llama'?"),
        (
            4,
            "output: a\nsearcher: {name: al_am, min_unit: 2}",
            "5:25: searcher.min_unit: unknown key; did you mean 'min_",
        ),
        (
            4,
            "output: a\nsearcher: {name: al_am, min_units: -1}",
            "5:36: searcher.min_units: expected at least 0, got -1",
        ),
        (
            4,
            "output: a\nsearcher: {name: al_am, min_units: 2.0}",
            "searcher.min_units: expected a whole number, got 2.0",
        ),
        (4, "output: a\ntrainer: {devices: 0}", "trainer.devices: expected at least 1 or 'auto', got 0"),
        (4, "output: a\ntrainer: {devices: all}", "trainer.devices: expected a whole number or 'auto', got 'all'"),
        (4, "output: a\ntrainer: {accelerator: no}", "trainer.accelerator: expected 'auto', 'cpu', 'gpu', 'cuda', 'm"),
        (4, "output: a\ntrainer: {max_steps: 5}", "r.yaml:5:11: trainer.max_steps: unknown key"),
        (4, "output: a\nplugins: ./x.py", "r.yaml:5:10: plugins: expected a list, got './x.py'"),
        (4, "output: a\nplugins: [1]", "r.yaml:5:11: plugins.0: expected text, got 1"),
        (4, "output: a\nplugins: [./x.py]", "r.yaml:5:11: plugins.0: plugin"),
        (
            4,
            "output: a\nevaluate: {perplexity: [{dataset: x}, {datset: x}]}",
            "evaluate.perplexity.1.datset: unknown key; did",
        ),
        (
            4,
            "output: a\nevaluate: {perplexity: [{dataset: x, stride: 9, length: 8}]}",
            "r.yaml:5:46: evaluate.perplexity.0.stride: expected at most the window's length, 8, got 9",
        ),
        (4, "output: a\nevaluate: {perplexity: {dataset: x}}", "evaluate.perplexity: expected a list, got a section"),
        (4, "output: *x", "r.yaml:4:9: output: aliases such as *x are not supported; write the value out"),
        (4, "output: a\noutput: b", "r.yaml:5:1: output: repeated key; first used at r.yaml:4:1"),
    ],
)
def test_one_problem(tmp_path: Path, line: int, text: str, problem: str) -> None:
    found = problems(tmp_path, replaced(line, text))
    assert len(found) == 1, found
    assert problem in found[0]


@pytest.mark.parametrize(
    "ratio", ["0", "1", "0.0", "1.0", "-0.2", "20", ".nan", ".inf", "nan", "'0.2'", "20%", "true", "[]"]
)
def test_a_ratio_that_is_none_says_what_to_give(tmp_path: Path, ratio: str) -> None:
    (problem,) = problems(tmp_path, replaced(3, f"budget: {{ratio: {ratio}}}"))
    assert problem.startswith("r.yaml:3:17: budget.ratio: ")
    assert "is not a ratio; give the fraction to remove, between 0 and 1, for example 0.2" in problem


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cpu_offload", "deepspeed_stage_3"])
def test_a_strategy_that_is_not_supported_says_what_to_set_instead(tmp_path: Path, strategy: str) -> None:
    (problem,) = problems(tmp_path, replaced(3, f"budget: {{ratio: 0.2}}\ntrainer: {{strategy: {strategy}}}"))
    assert f"trainer.strategy: {strategy} is not supported" in problem
    assert "`strategy: model_parallel`" in problem
    assert "`execution: layerwise`" in problem


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true", "16-true"])
def test_a_precision_that_a_sharded_model_does_not_have(tmp_path: Path, precision: str) -> None:
    trainer = f"trainer: {{strategy: model_parallel, precision: {precision}}}"
    (problem,) = problems(tmp_path, replaced(3, f"budget: {{ratio: 0.2}}\n{trainer}"))
    assert f"trainer.precision: {precision} is not supported with `strategy: model_parallel`" in problem


def test_a_ratio_in_percent_is_shown_as_a_fraction(tmp_path: Path) -> None:
    assert problems(tmp_path, replaced(3, "budget: {ratio: 35}"))[0].endswith("for example 0.35")


def test_1e_4_is_a_number(tmp_path: Path) -> None:
    assert load(tmp_path, replaced(3, "budget: {ratio: 1e-4}")).recipe.budget.ratio == 1e-4


def test_all_problems_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "model: {path: 5, dtype: float61}\n"
        "metric: wivf\n"
        "budget: {ratio: 2}\n"
        "budget: {ratio: 0.2}\n"
        "searcher: {name: al_am, min_unit: 2, min_units: -1}\n"
        "plugins: [./no.py]\n"
        "output: &x a\n",
        "budget.ration=0.3",
        "nonsense",
        "searcher.attention_power=high",
    )
    assert [problem.split(": ")[0] for problem in found] == [
        "r.yaml:1:1",
        "r.yaml:1:15",
        "r.yaml:1:25",
        "r.yaml:2:9",
        "r.yaml:3:17",
        "r.yaml:4:1",
        "r.yaml:5:25",
        "r.yaml:5:49",
        "r.yaml:6:11",
        "r.yaml:7:9",
        "--set budget.ration=0.3",
        "--set nonsense",
        "--set searcher.attention_power=high",
    ]
    assert found[0] == "r.yaml:1:1: calibration: required, but missing"


def test_a_misspelt_required_key_is_not_missing_besides(tmp_path: Path) -> None:
    assert len(problems(tmp_path, replaced(3, "budgte: {ratio: 0.2}"))) == 1


def test_a_recipe_error_is_bad_input() -> None:
    assert issubclass(RecipeError, InputError)
    assert RecipeError("a", "b").problems == ("a", "b")
    assert RecipeError.exit_code == 2


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "null\n"])
def test_an_empty_file(tmp_path: Path, text: str) -> None:
    assert problems(tmp_path, text) == [
        "r.yaml:1:1: the recipe is empty; it needs model, calibration, budget and output"
    ]


@pytest.mark.parametrize("text", ["just text\n", "- model\n", "5\n"])
def test_not_a_section(tmp_path: Path, text: str) -> None:
    assert problems(tmp_path, text)[0].startswith("r.yaml:1:1: a recipe is a section of keys")


def test_not_yaml(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "model: {path: x\noutput: y\n")
    assert problem.startswith("r.yaml:2:7: not YAML: while parsing a flow mapping")


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes("model: {path: x}\n# ä\noutput: ö".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"r\.yaml:2:3: not UTF-8; save the recipe as UTF-8"):
        load_recipe(path)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_recipe(path).recipe.output == "runs/x"


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no\.yaml: cannot be read: No such file"):
        load_recipe(tmp_path / "no.yaml")
    with pytest.raises(RecipeError, match=r"cannot be read: Is a directory"):
        load_recipe(str(tmp_path))


def with_plugin(options: str = "") -> str:
    return GOOD + f"plugins: [./mine.py]\nmetric: {{name: mine{options}}}\n"


def test_a_plugin_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write(tmp_path, PLUGIN, "mine.py")
    write(tmp_path, with_plugin(", power: 3, scale: 2, file: a/b, parts: [1, 2.5]"))
    loaded = load_recipe("../r.yaml")
    metric = loaded.metric
    assert metric.name == "mine"
    assert (metric.power, metric.scale, metric.parts) == (3, 2.0, (1.0, 2.5))  # type: ignore[attr-defined]
    assert metric.file == Path("a/b")  # type: ignore[attr-defined]
    assert loaded.recipe.plugins == (str(tmp_path / "mine.py"),)
    assert loaded.recipe.metric.options["inner"] == {"depth": 1}


def test_paths_on_the_command_line_are_relative_to_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    write(here, PLUGIN, "mine.py")
    for folder in (tmp_path, here):
        write(folder, "{}", "plan.json")
    recipe = write(tmp_path, GOOD + "searcher: {name: plan, path: plan.json}\n")
    loaded = load_recipe(recipe, ["plugins=[./mine.py]", "metric=mine"])
    assert loaded.recipe.plugins == (str(here / "mine.py"),)
    assert loaded.recipe.searcher.options["path"] == str(tmp_path / "plan.json")
    for text in ("searcher.path=plan.json", "searcher={name: plan, path: plan.json}"):
        assert load_recipe(recipe, [text]).recipe.searcher.options["path"] == str(here / "plan.json")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("power: '3'", "r.yaml:6:29: metric.power: expected a whole number, got '3'"),
        ("power: 0", "r.yaml:6:29: metric.power: expected at least 1, got 0"),
        ("scale: .inf", "r.yaml:6:29: metric.scale: expected a finite number, got .inf"),
        ("mode: men", "r.yaml:6:28: metric.mode: expected 'sum' or 'mean', got 'men'; did you mean 'mean'?"),
        ("parts: [1, x]", "r.yaml:6:33: metric.parts.1: expected a number, got 'x'"),
        ("inner: {dept: 2}", "r.yaml:6:30: metric.inner.dept: unknown key; did you mean 'depth'? (known: depth)"),
        ("inner: 5", "r.yaml:6:29: metric.inner: expected a section of keys, got 5"),
        ("scale: 13", "r.yaml:6:9: metric: 13 is unlucky"),
        ("scale: 14", "r.yaml:6:9: metric: 14 is too much"),
    ],
)
def test_a_plugins_options_are_checked(tmp_path: Path, options: str, problem: str) -> None:
    write(tmp_path, PLUGIN, "mine.py")
    found = problems(tmp_path, with_plugin(f", {options}"))
    assert len(found) == 1
    assert found[0].startswith(problem)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import nothing_of_this_name", "fails to import: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("def (", "fails to import: SyntaxError"),
        ("x = 1", "has no hook; decorate one with @flapkit.hookimpl"),
        (PLUGIN.replace("def flapkit_metrics", "def flapkit_metric"), "unknown hook 'flapkit_metric'; did you mean"),
        (PLUGIN.replace('name = "mine"', 'name = "wifv"'), "two plugins offer a metric named 'wifv'"),
        (PLUGIN.replace("[Mine]", "1 / 0"), "hook flapkit_metrics failed: ZeroDivisionError"),
    ],
)
def test_a_plugin_that_fails_is_reported_at_its_entry(tmp_path: Path, source: str, problem: str) -> None:
    write(tmp_path, source, "bad.py")
    write(tmp_path, PLUGIN.replace('"mine"', '"other"'), "good.py")
    found = problems(tmp_path, GOOD + "plugins:\n  - ./bad.py\n  - ./good.py\nmetric: mine_of_bad\n")
    assert len(found) == 1, found
    assert found[0].startswith("r.yaml:6:5: plugins.0: ")
    assert problem in found[0]


def test_a_plugin_named_twice(tmp_path: Path) -> None:
    write(tmp_path, PLUGIN, "mine.py")
    (problem,) = problems(tmp_path, GOOD + "plugins: [./mine.py, mine.py]\n")
    assert problem.startswith("r.yaml:5:22: plugins.1: plugin ")
    assert problem.endswith("is already loaded; list it once")


def test_options_that_pydantic_cannot_read(tmp_path: Path) -> None:
    write(tmp_path, PLUGIN.replace("scale: float = 1.0", "scale: ImportanceMetric | None = None"), "mine.py")
    (problem,) = problems(tmp_path, with_plugin())
    assert problem.startswith("r.yaml:6:9: metric: the options of Mine cannot be read: ")


def test_a_recipe_loads_twice_in_one_process(tmp_path: Path) -> None:
    write(tmp_path, PLUGIN, "mine.py")
    path = write(tmp_path, with_plugin())
    assert load_recipe(path).recipe == load_recipe(path).recipe


def test_find_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert find_recipe(path) == path
    assert find_recipe("demo") == shipped_recipes()["demo"]
    with pytest.raises(
        RecipeError,
        match=r"^demmo: no such file, and no shipped recipe of this name; did you mean 'demo'\? \(known: balanced, ",
    ):
        find_recipe("demmo")
    with pytest.raises(RecipeError, match=r"lama-7b-flap20.yaml: no such file.*did you mean 'llama-7b-flap20'"):
        find_recipe("recipes/lama-7b-flap20.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        find_recipe(tmp_path)


def test_shipped_recipes_of_a_wheel_and_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flapkit").mkdir()
    monkeypatch.setattr(flapkit, "__file__", str(tmp_path / "flapkit" / "__init__.py"))
    assert shipped_recipes() == {}
    (tmp_path / "recipes").mkdir()
    checkout = write(tmp_path / "recipes", GOOD, "mine.yaml")
    assert shipped_recipes() == {"mine": checkout}
    (tmp_path / "flapkit" / "_recipes").mkdir()
    wheel = write(tmp_path / "flapkit" / "_recipes", GOOD, "mine.yaml")
    assert shipped_recipes() == {"mine": wheel}


CORRECTOR = """\
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from flapkit import hookimpl
from flapkit.pruning.components import Compensator


@dataclass(frozen=True)
class Idle(Compensator):
    name = "idle"

    rank: Annotated[int, Field(ge=1)] = 8

    def recovery(self):
        return None


@hookimpl
def flapkit_compensators():
    return [Idle]
"""


def test_several_compensators(tmp_path: Path) -> None:
    (tmp_path / "idle.py").write_text(CORRECTOR)
    text = GOOD + "plugins: [./idle.py]\ncompensator: [bias, {name: idle, rank: 4}]\n"
    loaded = load(tmp_path, text)
    assert [compensator.name for compensator in loaded.compensators] == ["bias", "idle"]
    assert [spec.options for spec in loaded.recipe.compensator] == [{}, {"rank": 4}]
    assert "compensator:\n- bias\n- name: idle\n  rank: 4\n" in dump_recipe(loaded)


@pytest.mark.parametrize(
    ("compensator", "expected"),
    [
        ("[bias, bais]", "compensator.1: unknown compensator 'bais'; did you mean 'bias'?"),
        ("[bias, {name: bias, rank: 1}]", "compensator.1.rank: unknown key"),
        ("[bias, none]", "compensator: compensators 'bias' and 'none' correct the same weights; keep one of them"),
        ("[bias, 3]", "compensator.1: expected a name, or a section with a name and options"),
    ],
)
def test_problems_of_several_compensators(tmp_path: Path, compensator: str, expected: str) -> None:
    assert any(f": {expected}" in problem for problem in problems(tmp_path, f"{GOOD}compensator: {compensator}\n"))


@pytest.mark.parametrize(
    "key",
    ["calibration", "calibration.mix.1", "evaluate.perplexity.0", "compensator.1", "compensator.1.validation"],
    ids=str,
)
@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("dataset", "''", "expected text that is not empty, got ''"),
        ("dataset", '"a\\0b"', "path 'a\\x00b' cannot be used"),
        ("split", "1", "expected text, got 1"),
        ("fild", "x", "unknown key; did you mean 'field'?"),
    ],
)
def test_texts_are_checked_alike(tmp_path: Path, key: str, name: str, value: str, problem: str) -> None:
    """In calibration, in evaluation, and in a training and its validation."""
    calibration = "mix: [{dataset: stdlib}, {dataset: stdlib}]" if "mix" in key else "dataset: stdlib"
    text = GOOD.replace("dataset: stdlib", calibration) + (
        "evaluate: {perplexity: [{dataset: stdlib}]}\n"
        "compensator: [bias, {name: lora, dataset: stdlib, validation: {dataset: stdlib}}]\n"
    )
    (found,) = problems(tmp_path, text, f"{key}.{name}={value}")
    assert f"{key}.{name}: {problem}" in found
