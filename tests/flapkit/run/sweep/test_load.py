"""The points of a sweep, and what is said of a wrong one."""

from __future__ import annotations

import re

import pytest
import yaml
from sweeps import write_sweep

from flapkit.run.sweep.load import load_sweep, select, show
from flapkit.system.errors import RecipeError


def test_a_grid_is_every_combination_and_points_come_after(tmp_path):
    sweep = load_sweep(write_sweep(tmp_path, points=[{"compensator": "none"}]))
    assert [dict(point.settings) for point in sweep.points] == [
        {"metric": "wifv", "budget.ratio": 0.2},
        {"metric": "wifv", "budget.ratio": 0.4},
        {"metric": "magnitude", "budget.ratio": 0.2},
        {"metric": "magnitude", "budget.ratio": 0.4},
        {"compensator": "none"},
    ]
    assert [point.recipe.metric.name for point in sweep.points] == ["wifv", "wifv", "magnitude", "magnitude", "wifv"]
    assert sweep.points[4].recipe.recipe.budget.ratio == 0.2
    assert sweep.keys == ("metric", "budget.ratio", "compensator")


def test_points_do_not_touch_one_another(tmp_path):
    """A point that makes a section of a name leaves the name to the others."""
    points = [{"searcher.min_units": 3}, {"budget.ratio": 0.3}, {"searcher.min_units": 5}]
    sweep = load_sweep(write_sweep(tmp_path, grid={}, points=points))
    assert [point.recipe.searcher.min_units for point in sweep.points] == [3, 1, 5]


def test_methods_are_crossed_with_the_grid_and_named_by_points(tmp_path):
    methods = {"flap": {}, "repaired": {"compensator": "least_squares", "calibration.sequential": True}}
    points = [{"method": "repaired", "budget.ratio": 0.6}, {"metric": "random"}]
    sweep = load_sweep(write_sweep(tmp_path, methods=methods, grid={"budget.ratio": [0.2, 0.4]}, points=points))
    assert [(point.method, dict(point.settings)) for point in sweep.points] == [
        ("flap", {"budget.ratio": 0.2}),
        ("flap", {"budget.ratio": 0.4}),
        ("repaired", {"budget.ratio": 0.2}),
        ("repaired", {"budget.ratio": 0.4}),
        ("repaired", {"budget.ratio": 0.6}),
        (None, {"metric": "random"}),
    ]
    repaired = sweep.points[4].recipe
    assert (repaired.recipe.compensator[0].name, repaired.recipe.calibration.sequential) == ("least_squares", True)
    assert sweep.keys == ("budget.ratio", "metric")
    assert sweep.points[2].label == "repaired, budget.ratio=0.2"


def test_some_points_alone(tmp_path):
    sweep = load_sweep(
        write_sweep(tmp_path, methods={"a": {}, "b": {"metric": "ifv"}}, grid={"budget.ratio": [0.2, 0.4]})
    )
    chosen = select(sweep, ["method=b", "budget.ratio=0.4", "budget.ratio=0.2"]).points
    assert [point.label for point in chosen] == ["b, budget.ratio=0.2", "b, budget.ratio=0.4"]
    assert select(sweep, []) == sweep
    with pytest.raises(RecipeError, match=r"no point sets 'budget.rato'; did you mean 'budget.ratio'"):
        select(sweep, ["budget.rato=0.4"])
    with pytest.raises(RecipeError, match="has no such point"):
        select(sweep, ["method=c"])


def test_methods_alone_are_points(tmp_path):
    sweep = load_sweep(write_sweep(tmp_path, methods={"a": {"metric": "ifv"}, "b": {}}, grid={}))
    assert [point.label for point in sweep.points] == ["a", "b"]
    with pytest.raises(RecipeError, match="the points set this key"):
        load_sweep(write_sweep(tmp_path, methods={"a": {"metric": "ifv"}}, grid={}), ["metric=wifn"])


def test_set_holds_for_all_and_the_command_line_is_stronger(tmp_path):
    path = write_sweep(tmp_path, set={"calibration.samples": 6, "calibration.seed": 1})
    sweep = load_sweep(path, ["calibration.seed=7"])
    asked = {(p.recipe.recipe.calibration.samples, p.recipe.recipe.calibration.seed) for p in sweep.points}
    assert asked == {(6, 7)}


def test_a_recipe_by_name(tmp_path):
    sweep = load_sweep(write_sweep(tmp_path, recipe="demo"))
    assert {point.recipe.recipe.model.path for point in sweep.points} == {"builtin:tiny-llama"}


def test_everything_wrong_is_said_at_once_with_its_place(tmp_path):
    path = tmp_path / "sweep.yaml"
    write_sweep(tmp_path)
    path.write_text(
        "recipe: base.yaml\n"
        "set: {output: elsewhere}\n"
        "grid:\n"
        "  budget.ratio: [0.2, 1.5]\n"
        "points:\n"
        "  - {metric: wifw}\n"
        "  - {metrc: wifv}\n"
        "  - {searcher: {name: al_am, min_unit: 3}}\n"
        "plot: {x: budget.rato}\n"
        "output: out\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_sweep(path, ["budget.ratio=0.3"])
    said = [problem.removeprefix(f"{path}:") for problem in caught.value.problems]
    assert len(said) == 7
    for place, what in [
        ("2:7", "its own `output`"),
        ("4:23", "1.5 is not a ratio"),
        ("6:14", "did you mean 'wifv'"),
        ("7:6", "did you mean 'metric'"),
        ("8:30", "did you mean 'min_units'"),
        ("9:7", "did you mean 'budget.ratio'"),
        ("--set budget.ratio=0.3", "the points set this key"),
    ]:
        assert any(problem.startswith(place) and what in problem for problem in said), (place, said)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {}}, "the sweep has no points"),
        ({"grid": {"metric": []}}, "grid.metric"),
        ({"grid": {"plugins": [["x.py"]]}}, "the sweep's own `plugins`"),
        ({"grid": {"export": ["hf"]}}, "nothing to export"),
        ({"grid": {"..": [1]}}, "expected a dotted key"),
        ({"methods": {"dense": {}}}, "the dense model is always a row"),
        ({"methods": {"a": {"metric": "ifv"}}}, "the method 'a' sets this key too"),
        ({"methods": {"a": {}}, "points": [{"method": "b"}]}, "no method is called 'b'"),
        ({"methods": {"a": {"metrc": "ifv"}}}, "did you mean 'metric'"),
        ({"methods": {"a": "ifv"}}, "methods.a"),
        ({"recipe": "demmo"}, "did you mean 'demo'"),
        ({"outptu": "x"}, "did you mean 'output'"),
        ({"plugins": ["./missing.py"]}, "file not found"),
    ],
)
def test_bad_sweeps(tmp_path, changes, message):
    with pytest.raises(RecipeError) as caught:
        load_sweep(write_sweep(tmp_path, **changes))
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a list", "recipe: [", "recipe: demo\nrecipe: demo\noutput: x\ngrid: {a: [1]}"])
def test_what_is_no_sweep(tmp_path, text):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"sweep\.yaml:\d+:\d+"):
        load_sweep(tmp_path / "sweep.yaml")


def test_settings_in_short():
    assert show({"name": "al_am", "min_units": 2}) == "al_am(min_units=2)"
    assert show(["bias", {"name": "lora", "rank": 8}]) == "bias+lora(rank=8)"
    assert show(0.2) == "0.2"


def test_files_are_found_beside_what_names_them(tmp_path):
    """A plan that a point names lies beside the sweep, one that the base recipe names beside that."""
    (tmp_path / "base").mkdir()
    path = write_sweep(tmp_path, recipe="base/base.yaml", grid={"budget.ratio": [0.2]}, points=[])
    recipe = yaml.safe_load((tmp_path / "base.yaml").read_text())
    recipe["searcher"] = {"name": "plan", "path": "a.json"}
    (tmp_path / "base" / "base.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "base" / "a.json").write_text('{"keep": {}}')
    (tmp_path / "b.json").write_text('{"keep": {}}')
    assert load_sweep(path).points[0].recipe.searcher.path == tmp_path / "base" / "a.json"
    write_sweep(tmp_path, recipe="base/base.yaml", grid={"searcher": [{"name": "plan", "path": "b.json"}]})
    assert load_sweep(path).points[0].recipe.searcher.path == tmp_path / "b.json"


@pytest.mark.parametrize("text", ["plugins=[./mine.py]", "output=elsewhere", "export=gguf"])
def test_what_belongs_to_the_sweep_is_not_overridden(tmp_path, text):
    with pytest.raises(RecipeError, match=rf"^--set {re.escape(text)}: {text.partition('=')[0]}: "):
        load_sweep(write_sweep(tmp_path), [text])
