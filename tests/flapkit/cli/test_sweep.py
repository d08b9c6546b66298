"""`flapkit sweep`: whatever goes wrong in a point is its row's error, and the exit code is 1."""

from __future__ import annotations

import csv

from sweeps import write_sweep

from flapkit.execution.runtime import Runtime

METRICS = """
from dataclasses import dataclass

from flapkit import hookimpl
from flapkit.interfaces import ImportanceMetric


@dataclass(frozen=True)
class RaisesValue(ImportanceMetric):
    name = "raises_value"

    def score(self, site, stats, weight):
        raise ValueError("a value of mine")


@dataclass(frozen=True)
class RaisesKey(ImportanceMetric):
    name = "raises_key"

    def score(self, site, stats, weight):
        return {}["a key of mine"]


@hookimpl
def flapkit_metrics():
    return [RaisesValue, RaisesKey]
"""


def rows_of(home) -> dict[str, dict[str, str]]:
    with (home / "out" / "table.csv").open() as file:
        return {row["metric"]: row for row in csv.DictReader(file) if row["method"] != "dense"}


def test_errors_of_a_plugin(command, home):
    (home / "mine.py").write_text(METRICS)
    path = write_sweep(home, plugins=["./mine.py"], grid={"metric": ["raises_value", "raises_key", "magnitude"]})
    code, _, err = command("sweep", path)
    assert code == 1
    assert "2 of 3 points failed" in err
    assert "Traceback" not in err
    rows = rows_of(home)
    assert "metric 'raises_value' at layers.0.attention: ValueError: a value of mine" in rows["raises_value"]["error"]
    assert "metric 'raises_key' at layers.0.attention: KeyError: 'a key of mine'" in rows["raises_key"]["error"]
    assert rows["magnitude"]["error"] == ""


def test_errors_that_no_one_expects(command, home, monkeypatch):
    """One that is not flapkit's, in one point only: the next point runs."""
    evaluate, raised = Runtime.evaluate, []

    def fail_once(self, *arguments, **options):
        if arguments[2] == "evaluate pruned" and not raised:
            raised.append(1)
            raise KeyError("lost")
        return evaluate(self, *arguments, **options)

    monkeypatch.setattr(Runtime, "evaluate", fail_once)
    code, _, err = command("sweep", write_sweep(home, grid={"metric": ["magnitude", "random"]}))
    assert code == 1
    assert "1 of 2 points failed" in err
    assert "Traceback" not in err
    assert {name: row["error"] for name, row in rows_of(home).items()} == {
        "magnitude": "KeyError: 'lost'",
        "random": "",
    }
