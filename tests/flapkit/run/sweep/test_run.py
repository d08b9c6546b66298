"""A sweep: each point is what a run of it alone gives, and one calibration serves all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sweeps import write_sweep

from flapkit.run.pipeline import run
from flapkit.run.sweep.load import load_sweep
from flapkit.run.sweep.results import Results
from flapkit.run.sweep.run import run_sweep
from flapkit.system.errors import RecipeError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_point_is_what_a_run_of_it_gives(home, forwards):
    changes = {"grid": {"metric": ["wifv", "obs"], "compensator": ["bias", "none"]}}
    sweep = load_sweep(write_sweep(home, **changes))
    rows = run_sweep(sweep, Results(home / "out"))
    assert len(forwards) == 1
    for point, row in zip(sweep.points, rows, strict=True):
        record = run(point.recipe, overwrite=True)
        assert row.error is None
        assert (row.params, row.perplexity) == (record.params, record.perplexity)


def test_carries_on_with_what_is_missing(home, monkeypatch, forwards):
    sweep = load_sweep(write_sweep(home))
    run_sweep(load_sweep(write_sweep(home, grid={"metric": ["wifv"], "budget.ratio": [0.2]})), Results(home / "out"))
    results, added = Results(home / "out"), []
    add = results.add
    monkeypatch.setattr(results, "add", lambda row: added.append(row) or add(row))
    rows = run_sweep(sweep, results)
    assert (len(rows), len(added)) == (4, 3)
    assert [row.settings for row in rows] == [point.settings for point in sweep.points]
    forwards.clear()
    assert run_sweep(sweep, results) == rows
    assert forwards == []


def test_other_text_or_weights_are_other_points(home):
    path = write_sweep(home, grid={"metric": ["magnitude"]})
    results = Results(home / "out")
    (first,) = run_sweep(load_sweep(path), results)
    (home / "text.txt").write_text("import flapkit\n" * 500)
    (second,) = run_sweep(load_sweep(path), results)
    assert first.id != second.id
    assert len(results.rows) == 2


def test_a_point_that_fails_does_not_stop_the_others(home):
    points = [{"budget.ratio": 0.99}, {"calibration.samples": 2, "compensator": "least_squares"}, {"metric": "random"}]
    rows = run_sweep(load_sweep(write_sweep(home, grid={}, points=points)), Results(home / "out"))
    assert [row.error is None for row in rows] == [False, False, True]
    assert "the largest ratio of blocks" in rows[0].error
    assert "held-out" in rows[1].error


def test_two_calibrations(home, forwards):
    sweep = load_sweep(write_sweep(home, grid={"calibration.samples": [4, 8], "budget.ratio": [0.2, 0.3]}))
    rows = run_sweep(sweep, Results(home / "out"))
    assert len(forwards) == 2
    assert len({row.perplexity["text.txt, 32 tokens"]["pruned"] for row in rows}) == 4


def test_what_cannot_share_its_calibration_measures_for_itself(home, forwards):
    """Statistics that do not fit, or come one after the other, are those of a run by itself."""
    grid = {"calibration.statistics_memory": ["100KB", "4GB"], "calibration.sequential": [False, True]}
    sweep = load_sweep(write_sweep(home, grid=grid))
    rows = run_sweep(sweep, Results(home / "out"))
    for point, row in zip(sweep.points, rows, strict=True):
        assert row.error is None
        assert row.perplexity == run(point.recipe, overwrite=True).perplexity


def test_a_compensator_that_trains_is_refused(home):
    sweep = load_sweep(write_sweep(home, grid={"compensator": ["bias", "lora"]}))
    with pytest.raises(RecipeError, match="compensator=lora: a sweep does not train"):
        run_sweep(sweep, Results(home / "out"))


def test_several_devices_are_refused(home):
    sweep = load_sweep(write_sweep(home, grid={"trainer.devices": [1, 2]}))
    with pytest.raises(RecipeError, match="devices=2: a sweep runs on one device"):
        run_sweep(sweep, Results(home / "out"))


def test_a_metric_of_ones_own_beside_the_others(home):
    readme = (Path(__file__).parents[4] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(# my_metric\.py.*?)```", readme, flags=re.DOTALL)
    (home / "my_metric.py").write_text(example)
    grid = {"metric": ["magnitude", "my_magnitude", "random"]}
    rows = run_sweep(load_sweep(write_sweep(home, grid=grid, plugins=["./my_metric.py"])), Results(home / "out"))
    assert [row.error for row in rows] == [None, None, None]
    assert [row.settings["metric"] for row in rows] == grid["metric"]
