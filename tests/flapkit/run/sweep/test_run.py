"""A sweep: each point is what a run of it alone gives, and one calibration serves all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from sweeps import write_sweep

from flapkit.recipe.load import load_recipe
from flapkit.run.pipeline import run
from flapkit.run.sweep import point as module
from flapkit.run.sweep.load import load_sweep
from flapkit.run.sweep.results import Results
from flapkit.run.sweep.run import run_sweep
from flapkit.system.errors import RecipeError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_point_is_what_a_run_of_it_gives(home, forwards):
    points = [{"metric": "wifv", "compensator": "none"}, {"metric": "obs", "compensator": "bias"}]
    sweep = load_sweep(write_sweep(home, grid={}, points=points))
    rows = run_sweep(sweep, home / "out")
    assert len(forwards) == 1
    for point, row in zip(sweep.points, rows, strict=True):
        record = run(point.recipe, overwrite=True)
        assert row.error is None
        assert (row.params, row.perplexity) == (record.params, record.perplexity)


def test_carries_on_with_what_is_missing(home, monkeypatch, forwards):
    sweep = load_sweep(write_sweep(home))
    run_sweep(load_sweep(write_sweep(home, grid={"metric": ["wifv"], "budget.ratio": [0.2]})), home / "out")
    added, add = [], Results.add
    monkeypatch.setattr(Results, "add", lambda self, row: added.append(row) or add(self, row))
    rows = run_sweep(sweep, home / "out")
    assert (len(rows), len(added)) == (4, 3)
    assert [row.settings for row in rows] == [point.settings for point in sweep.points]
    forwards.clear()
    assert run_sweep(sweep, home / "out") == rows
    assert forwards == []


def test_other_text_weights_or_files_are_other_points(home):
    path = write_sweep(home, grid={"searcher": [{"name": "plan", "path": "plan.json"}]})
    run(load_recipe(home / "base.yaml", ["output=first"]))
    (home / "plan.json").write_bytes((home / "first" / "plan.json").read_bytes())
    (first,) = run_sweep(load_sweep(path), home / "out")
    (home / "text.txt").write_text("import flapkit\n" * 500)
    (second,) = run_sweep(load_sweep(path), home / "out")
    (home / "plan.json").write_text((home / "plan.json").read_text() + "\n")
    (third,) = run_sweep(load_sweep(path), home / "out")
    assert len({first.id, second.id, third.id}) == len(Results(home / "out").rows) == 3


def test_a_point_that_fails_does_not_stop_the_others(home):
    points = [{"budget.ratio": 0.99}, {"calibration.samples": 2, "compensator": "least_squares"}, {"metric": "random"}]
    rows = run_sweep(load_sweep(write_sweep(home, grid={}, points=points)), home / "out")
    assert [row.error is None for row in rows] == [False, False, True]
    assert "the largest ratio of blocks" in rows[0].error
    assert "held-out" in rows[1].error


def test_two_calibrations(home, forwards):
    sweep = load_sweep(write_sweep(home, grid={"calibration.samples": [4, 8], "budget.ratio": [0.2, 0.3]}))
    rows = run_sweep(sweep, home / "out")
    assert len(forwards) == 2
    assert len({row.perplexity["text.txt, 32 tokens"]["pruned"] for row in rows}) == 4


def test_what_cannot_share_its_calibration_measures_for_itself(home, forwards):
    """Statistics that do not fit, or come one after the other, are those of a run by itself."""
    grid = {"calibration.statistics_memory": ["100KB", "4GB"], "calibration.sequential": [False, True]}
    sweep = load_sweep(write_sweep(home, grid=grid))
    rows = run_sweep(sweep, home / "out")
    for point, row in zip(sweep.points, rows, strict=True):
        assert row.error is None
        assert row.perplexity == run(point.recipe, overwrite=True).perplexity


LORA = {"name": "lora", "rank": 2, "steps": 2, "validate_every": 1, "validation_windows": 2, "length": 16, "lr": 0.01}


def write_tasks(folder: Path) -> dict[str, object]:
    """Write the rows of a task, and return what measures it."""
    row = {"query": "return", "choices": ["model", "a", "b", "c"], "gold": 0}
    (folder / "openbookqa.jsonl").write_text(f"{json.dumps(row)}\n" * 2 + json.dumps({**row, "gold": 1}) + "\n")
    return {"evaluate.zero_shot": {"tasks": ["openbookqa"], "data_dir": "."}}


def test_a_point_that_trains_and_answers_is_what_a_run_of_it_gives(home):
    """The dense model is not changed by the training: what is pruned after it is what it was before."""
    pytest.importorskip("lm_eval")
    (home / "other.txt").write_text("def layer(model):\n    return model.layers\n" * 200)
    trained = {"compensator": ["bias", {**LORA, "distill": True}]}
    methods = {"flap": {}, "trained": trained, "flap again": {"report.error_windows": 0}}
    measured = {"evaluate.perplexity": [{"dataset": "other.txt", "length": 32, "windows": 2}], **write_tasks(home)}
    sweep = load_sweep(write_sweep(home, methods=methods, grid={}, set=measured))
    before, row, after = run_sweep(sweep, home / "out")
    assert [one.error for one in (before, row, after)] == [None] * 3
    assert [one.stage for one in (before, row, after)] == ["pruned", "recovered", "pruned"]
    assert (before.perplexity, before.scores) == (after.perplexity, after.scores)
    record = run(sweep.points[1].recipe)
    assert row.params == record.params
    for text, figures in row.perplexity.items():
        assert figures["recovered"] == record.perplexity[text]["recovered"]
        assert figures["recovered"] != record.perplexity[text]["pruned"]
    answers, expected = (each.zero_shot["openbookqa"]["metrics"]["acc_norm"] for each in (row, record))
    for stage in ("dense", "recovered"):
        assert row.scores["openbookqa"][stage] == row.scores["mean"][stage] == answers[stage] == expected[stage]
    assert row.minutes > 0


def test_other_rows_of_a_task_are_another_point(home):
    pytest.importorskip("lm_eval")
    path = write_sweep(home, grid={"metric": ["magnitude"]}, set=write_tasks(home))
    (first,) = run_sweep(load_sweep(path), home / "out")
    rows = (home / "openbookqa.jsonl").read_text().replace('"gold": 1', '"gold": 2')
    (home / "openbookqa.jsonl").write_text(rows)
    (second,) = run_sweep(load_sweep(path), home / "out")
    assert first.id != second.id


def test_what_points_share_is_computed_once(home, monkeypatch, forwards):
    """One calibration and one search for points that differ in their repair, also if the sweep is interrupted."""
    searches, search, repair_, stopped = [], module.search, module.repair_, []
    monkeypatch.setattr(module, "search", lambda *args, **options: searches.append(args) or search(*args, **options))

    def stop_once(executor, method, *args, **options):
        if options["sequential"] and not stopped:
            stopped.append(method)
            raise KeyboardInterrupt
        return repair_(executor, method, *args, **options)

    monkeypatch.setattr(module, "repair_", stop_once)
    searcher = {"name": "evolution", "generations": 1, "children": 2, "survivors": 1, "steps": [0.25]}
    methods = {
        "evolution": {"compensator": "least_squares"},
        "evolution + sweep": {"compensator": "least_squares", "calibration.sequential": True},
        "evolution + bias": {"compensator": "bias"},
    }
    path = write_sweep(home, methods=methods, grid={}, set={"searcher": searcher})
    with pytest.raises(KeyboardInterrupt):
        run_sweep(load_sweep(path), home / "out")
    rows = run_sweep(load_sweep(path), home / "out")
    assert [row.error for row in rows] == [None] * 3
    assert len(searches) == 2
    assert rows[0].params["removed"] == rows[1].params["removed"]
    assert rows[0].perplexity != rows[1].perplexity
    # On all windows once for each start of the sweep, and once for each search on those that it does not judge on.
    assert sorted(len(batch["input_ids"]) for batch in forwards) == [6, 6, 8, 8]
    assert not list(home.glob(".*"))


def test_gates_in_a_sweep(home):
    methods = {"gates": {"searcher": {"name": "gates", "steps": 2, "validate_every": 1}}, "flap": {}}
    rows = run_sweep(load_sweep(write_sweep(home, methods=methods, grid={})), home / "out")
    assert [(row.method, row.error) for row in rows] == [("gates", None), ("flap", None)]


def test_several_devices_are_refused(home):
    sweep = load_sweep(write_sweep(home, grid={"trainer.devices": [1, 2]}))
    with pytest.raises(RecipeError, match="devices=2: a sweep runs on one device"):
        run_sweep(sweep, home / "out")


def test_a_metric_of_ones_own_beside_the_others(home):
    readme = (Path(__file__).parents[4] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(# my_metric\.py.*?)```", readme, flags=re.DOTALL)
    (home / "my_metric.py").write_text(example)
    grid = {"metric": ["magnitude", "my_magnitude", "random"]}
    rows = run_sweep(load_sweep(write_sweep(home, grid=grid, plugins=["./my_metric.py"])), home / "out")
    assert [row.error for row in rows] == [None, None, None]
    assert [row.settings["metric"] for row in rows] == grid["metric"]
