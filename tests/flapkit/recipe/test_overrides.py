from __future__ import annotations

from pathlib import Path

import pytest

from flapkit.recipe.load import LoadedRecipe, load_recipe
from flapkit.system.errors import RecipeError

TEXT = """\
model: {path: somewhere}
calibration: {dataset: stdlib}
budget: {ratio: 0.2}
evaluate: {perplexity: [{dataset: a}, {dataset: b}]}
output: runs/x
"""


def load(folder: Path, *overrides: str, text: str = TEXT) -> LoadedRecipe:
    path = folder / "r.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def problem(folder: Path, *overrides: str, text: str = TEXT) -> str:
    with pytest.raises(RecipeError) as raised:
        load(folder, *overrides, text=text)
    (only,) = raised.value.problems
    return only.replace(f"{folder}/", "")


def test_a_budget_without_a_kind(tmp_path: Path) -> None:
    expected = "r.yaml:3:9: budget: expected one of ratio, params, active_params, memory, kv_cache and latency"
    assert problem(tmp_path, "budget.ratio=") == expected


def test_values_are_replaced(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "budget.ratio=1e-1",
        "model.dtype = float16",
        "evaluate.perplexity.1.length=64",
        "model.revision=",
        "output=a=b",
    ).recipe
    assert recipe.budget.ratio == 0.1
    assert recipe.model.dtype == "float16"
    assert [entry.length for entry in recipe.evaluate.perplexity] == [128, 64]
    assert recipe.model.revision is None
    assert recipe.output == "a=b"


def test_the_last_of_two_holds(tmp_path: Path) -> None:
    assert load(tmp_path, "budget.ratio=0.3", "budget.ratio=0.4").recipe.budget.ratio == 0.4


def test_missing_sections_are_made(tmp_path: Path) -> None:
    assert load(tmp_path, "trainer.accelerator=cpu").recipe.trainer.accelerator == "cpu"
    assert load(tmp_path, "trainer.devices=2", text=TEXT + "trainer:\n").recipe.trainer.devices == 2


def test_a_value_can_be_a_list_or_a_section(tmp_path: Path) -> None:
    recipe = load(tmp_path, "evaluate.perplexity=[{dataset: c, length: 32}]", "budget={ratio: 0.5, of: mlp}").recipe
    assert [entry.dataset for entry in recipe.evaluate.perplexity] == ["c"]
    assert recipe.budget.of == "mlp"


def test_a_component_is_replaced_whole(tmp_path: Path) -> None:
    loaded = load(tmp_path, "compensator=none", text=TEXT + "compensator: {name: bias}\n")
    assert [compensator.name for compensator in loaded.compensators] == ["none"]


@pytest.mark.parametrize("searcher", ["", "searcher: al_am\n", "searcher: {name: al_am, attention_power: 2}\n"])
def test_an_option_of_a_component(tmp_path: Path, searcher: str) -> None:
    loaded = load(tmp_path, "searcher.min_units=2", text=TEXT + searcher)
    assert loaded.searcher.name == "al_am"
    assert loaded.searcher.min_units == 2  # type: ignore[attr-defined]


def test_an_option_of_one_of_several(tmp_path: Path) -> None:
    loaded = load(tmp_path, "compensator=[none]", "compensator.0=bias")
    assert [compensator.name for compensator in loaded.compensators] == ["bias"]
    text = TEXT + "compensator: [bias]\n"
    assert problem(tmp_path, "compensator.0.rank=4", text=text).startswith(
        "--set compensator.0.rank=4: compensator.0.rank: unknown key"
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "budget.ration=0.3",
            "budget.ration: unknown key; did you mean 'ratio'? (known: active_params, batch, dtype, head_counts, "
            "kv_cache, latency, memory, multiple_of, of, on, params, prompt, ratio, tensor_parallel)",
        ),
        ("budget.ratio=3", "budget.ratio: 3 is not a ratio; give the fraction to remove"),
        ("metric=wivf", "metric: unknown metric 'wivf'; did you mean 'wifv'?"),
        ("searcher.min_unit=2", "searcher.min_unit: unknown key; did you mean 'min_units'?"),
        ("searcher.min_units=-1", "searcher.min_units: expected at least 0, got -1"),
        ("adapter.x=1", "adapter.x: unknown key (known: expert_unit, unit)"),
        ("budget", "expected key=value, such as budget.ratio=0.3"),
        ("=1", "expected key=value"),
        ("budget..ratio=1", "expected key=value"),
        ("budget.ratio=[1", "budget.ratio: not YAML: "),
        ("budget.ratio=!!float 1", "budget.ratio: tags such as tag:yaml.org,2002:float are not supported"),
        ("evaluate.perplexity.2.length=4", "evaluate.perplexity.2: the list has no entry '2' (known: 0, 1)"),
        ("evaluate.perplexity.first.length=4", "evaluate.perplexity.first: the list has no entry 'first'"),
        ("evaluate.perplexity.2={dataset: x}", "evaluate.perplexity.2: the list has no entry '2'"),
        ("model.path.x=1", "model.path.x: 'somewhere' at r.yaml:1:15 is not a section"),
        ("output.x.y=1", "output.x: 'runs/x' at r.yaml:5:9 is not a section"),
    ],
)
def test_problems_name_the_override(tmp_path: Path, override: str, expected: str) -> None:
    assert problem(tmp_path, override).startswith(f"--set {override}: {expected}")
