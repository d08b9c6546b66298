from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flapkit.recipe.dump import dump_recipe
from flapkit.recipe.load import load_recipe
from flapkit.recipe.nodes import LARGEST_INTEGER, Position, parse
from flapkit.recipe.schema import ComponentSpec, Recipe

PLUGIN = """\
from dataclasses import dataclass

from flapkit import hookimpl
from flapkit.pruning.components import ImportanceMetric


@dataclass(frozen=True)
class Mine(ImportanceMetric):
    name = "mine"
    scale: float = 1e-5
    words: tuple[str, ...] = ("no", "1e-4", "0o17", "")

    def score(self, site, stats, weight):
        return weight


@hookimpl
def flapkit_metrics():
    return [Mine]
"""


def bare(**changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "model": {"path": "m"},
        "calibration": {"dataset": "d"},
        "budget": {"ratio": 0.2},
        "output": "o",
    }
    return Recipe.model_validate({**data, **changes})


def read(text: str) -> Any:
    node, problems = parse(text, lambda line, column: Position("r.yaml", line, column))
    assert not problems
    assert node is not None
    return node.plain()


def test_a_resolved_recipe_loads_to_an_equal_one(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: {path: ö, revision: '1e-4'}\n"
        "adapter: llama\n"
        "calibration: {dataset: stdlib, subset: 'no'}\n"
        "metric: mine\n"
        "searcher: {name: al_am, attention_power: 1}\n"
        "budget: {ratio: 1e-4}\n"
        "evaluate: {perplexity: [{dataset: a, stride: 5}]}\n"
        "plugins: [mine.py]\n"
        "output: 'null'\n"
    )
    loaded = load_recipe(path)
    (tmp_path / "out").mkdir()
    again_path = tmp_path / "out" / "recipe.yaml"
    again_path.write_text(dump_recipe(loaded), encoding="utf-8")
    again = load_recipe(again_path)
    assert again.recipe == loaded.recipe
    assert again.searcher == loaded.searcher
    assert again.recipe.budget.ratio == 1e-4
    assert dump_recipe(again) == dump_recipe(loaded)


def test_every_default_is_written(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {path: m}\ncalibration: {dataset: d}\nbudget: {ratio: 0.2}\noutput: o\n")
    data = read(dump_recipe(load_recipe(path)))
    assert set(data) == set(Recipe.model_fields)
    assert data["searcher"] == {"name": "al_am", "min_units": 1, "attention_power": 2.0}
    assert data["metric"] == "wifv"
    assert data["adapter"] == {"name": "auto", "unit": "kv_group", "expert_unit": "channel"}
    assert data["trainer"] == {
        "accelerator": "auto",
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "precision": None,
        "accumulate_grad_batches": 1,
        "gradient_clip_val": 1.0,
        "logger": ["csv"],
    }


@given(
    st.one_of(
        st.text(st.characters(codec="utf-8")),
        st.from_regex(r"[-+.0-9eExo_:~]{1,8}", fullmatch=True),
        st.sampled_from(
            [
                "no",
                "on",
                "null",
                "~",
                "1e-4",
                "0o7",
                "0x1F",
                "08",
                "1.",
                ".5e3",
                ".nan",
                "-.inf",
                "=",
                "<<",
                "\x85",
                "a\u2028b\u2029",
            ]
        ),
        st.sampled_from(["\x85", "a\u2028b", "a\u2029"]),
        st.floats(allow_nan=False),
        st.integers(-LARGEST_INTEGER, LARGEST_INTEGER),
        st.booleans(),
        st.none(),
    )
)
def test_any_option_survives(value: str | float | bool | None) -> None:
    recipe = bare(metric=ComponentSpec(name="x", option=value, twice=[value, value]))
    found = read(dump_recipe(recipe))["metric"]
    assert found == {"name": "x", "option": value, "twice": [value, value]}
    assert type(found["option"]) is type(value)


@pytest.mark.parametrize("ratio", [1e-4, 1e-5, 1e-300, 0.1 + 0.2, 1 - 2**-53])
def test_a_ratio_survives(ratio: float) -> None:
    assert read(dump_recipe(bare(budget={"ratio": ratio})))["budget"]["ratio"] == ratio
