"""What is made of a sweep's rows."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from xml.etree import ElementTree

import pytest

from flapkit.recipe.schema import Perplexity
from flapkit.run.sweep.plot import Panel, draw, lines, panels_of
from flapkit.run.sweep.results import Row
from flapkit.run.sweep.schema import Plot
from flapkit.run.sweep.table import table, to_csv
from flapkit.run.text import name_evaluations

KEYS = ("metric", "calibration.seed", "budget.ratio")
TEXT = Panel.of_text("text")


def row(metric, seed, ratio, pruned):
    settings = {"metric": metric, "calibration.seed": seed, "budget.ratio": ratio}
    params = {"dense": 100, "pruned": round(100 * (1 - ratio)), "blocks": 80, "removed": round(100 * ratio)}
    return Row(f"{settings}", settings, None, params, {"text": {"dense": 5.0, "pruned": pruned}})


ROWS = [row(m, s, r, 5 + 10 * r + s) for m in ("wifv", "ifv") for s in (0, 1) for r in (0.2, 0.5)]
FAILED = Row("failed", {"metric": "wifv"}, "BudgetError: too much")


def test_a_line_for_each_method():
    found = lines([*ROWS, FAILED], KEYS, Plot(), TEXT)
    assert list(found) == ["wifv, seed 0", "wifv, seed 1", "ifv, seed 0", "ifv, seed 1"]
    assert found["wifv, seed 1"].values == {80: [8.0], 50: [11.0]}


def test_averaged_over_seeds():
    found = lines(ROWS, KEYS, Plot(x="budget.ratio", over=("calibration.seed",)), TEXT)
    assert list(found) == ["wifv", "ifv"]
    assert found["wifv"].values == {0.2: [7.0, 8.0], 0.5: [10.0, 11.0]}


@pytest.mark.parametrize("rows", [ROWS, [*ROWS, FAILED], [FAILED], []])
def test_pictures(rows):
    assert draw(rows, KEYS, Plot(over=("calibration.seed",)), "png").startswith(b"\x89PNG")
    svg = draw(rows, KEYS, Plot(), "svg")
    ElementTree.fromstring(svg)
    assert draw(rows, KEYS, Plot(), "svg") == svg


@pytest.mark.parametrize(
    "perplexities", [[5.0, 40.0], [5.0, 400.0], [5.0, 5e4], [5.0, float("inf")], [700.0], [7.0, 7.0]]
)
@pytest.mark.parametrize("x", ["parameters", "budget.ratio"])
def test_axes_are_labelled_with_numbers(perplexities, x):
    """One to four decades and more, one point, equal points: no formula, and at least two numbers on either axis."""
    rows = [row("wifv", 0, (index + 1) / 10, pruned) for index, pruned in enumerate(perplexities)]
    svg = draw(rows, KEYS, Plot(x=x), "svg").decode()
    assert not re.search(r"[$\\]|math", svg.partition("</metadata>")[2])
    for axis in ("xtick", "ytick"):
        labels = re.findall(rf'id="{axis}_\d+">.*?<text[^>]*>([^<]*)</text>', svg, flags=re.DOTALL)
        assert len(set(labels)) == len(labels) >= 2
        assert all(float(label.replace(",", "").replace("\N{MINUS SIGN}", "-")) >= 0 for label in labels)


def scored(method, ratio, pruned, accuracy):
    """A row of a method, with a task."""
    scores = {"dense": {"value": 0.6, "stderr": 0.02}, "pruned": {"value": accuracy, "stderr": None}}
    plain = row(method, 0, ratio, pruned)
    settings = {"budget.ratio": ratio}
    return dataclasses.replace(plain, settings=settings, scores={"piqa": scores, "mean": scores}, method=method)


def test_methods_and_tasks():
    """The legend has the method's name, and the tasks have a panel."""
    rows = [
        scored(method, ratio, 5 + 10 * ratio, 0.6 - ratio / 2) for method in ("FLAP", "mine") for ratio in (0.2, 0.5)
    ]
    text, tasks = panels_of(rows)
    assert list(lines(rows, ("budget.ratio",), Plot(), text)) == ["FLAP", "mine"]
    found = lines(rows, ("budget.ratio",), Plot(x="budget.ratio"), tasks)
    assert found["mine"].values == {0.2: [pytest.approx(50)], 0.5: [pytest.approx(35)]}
    assert draw(rows, ("budget.ratio",), Plot(), "png").startswith(b"\x89PNG")


def read_csv(keys, rows):
    return list(csv.DictReader(io.StringIO(to_csv(table(keys, rows)))))


def test_csv():
    """The dense model is a row; of the settings it has only the model's own."""
    dense, pruned, failed = read_csv(KEYS, [*ROWS[:1], FAILED])
    assert (dense["method"], dense["metric"], dense["parameters"], float(dense["removed"])) == ("dense", "", "100", 0)
    assert (float(dense["perplexity.text"]), float(pruned["perplexity.text"])) == (5.0, 7.0)
    assert (pruned["method"], pruned["metric"], float(pruned["removed"])) == ("", "wifv", 0.25)
    assert failed["error"] == "BudgetError: too much"


def test_csv_of_tasks():
    dense, pruned = read_csv(("budget.ratio",), [scored("FLAP", 0.2, 7.0, 0.5)])
    names = ("method", "zero_shot.piqa", "zero_shot.piqa.stderr", "zero_shot.mean")
    assert [dense[name] for name in names] == ["dense", "0.6", "0.02", "0.6"]
    assert [pruned[name] for name in names] == ["FLAP", "0.5", "", "0.5"]


def test_each_dense_model_is_a_row():
    """Two models, each of which two rows share."""
    rows = []
    for path, dense in (("a", 5.0), ("b", 6.0)):
        for plain in ROWS[:2]:
            settings = {**plain.settings, "model.path": path}
            rows.append(
                dataclasses.replace(plain, settings=settings, perplexity={"text": {"dense": dense, "pruned": 9.0}})
            )
    found = read_csv((*KEYS, "model.path"), rows)
    assert [(line["method"], line["model.path"], line["perplexity.text"]) for line in found[:2]] == [
        ("dense", "a", "5.0"),
        ("dense", "b", "6.0"),
    ]
    assert len(found) == 6


def test_a_trained_model_is_what_its_row_shows():
    trained = dataclasses.replace(ROWS[0], perplexity={"text": {"dense": 5.0, "recovered": 6.0}})
    assert trained.stage == "recovered"
    assert read_csv(KEYS, [trained])[1]["perplexity.text"] == "6.0"
    assert lines([trained], KEYS, Plot(), TEXT)["wifv, seed 0"].values == {80: [6.0]}


def test_columns_are_identifiers():
    """A column for each text, whatever its name; the same names as a run gives to its texts."""
    texts = [
        *name_evaluations(
            [
                Perplexity(dataset="data/valid.txt", length=128),
                Perplexity(dataset="data/valid.txt", length=128, windows=4),
                Perplexity(dataset="stdlib", split="heldout", length=2048, stride=512),
                Perplexity(dataset="my text: one.jsonl.gz", length=64),
                Perplexity(dataset="valid.md", length=128),
            ]
        ),
        "$",
        "",
    ]
    measured = {text: {"dense": 5.0, "pruned": 7.0} for text in texts}
    found = [column.name for column in table(KEYS, [dataclasses.replace(ROWS[0], perplexity=measured)])]
    assert [name for name in found if name.startswith("perplexity.")] == [
        "perplexity.valid.128",
        "perplexity.valid.128.2",
        "perplexity.stdlib_heldout.2048.stride_512",
        "perplexity.my_text_one.64",
        "perplexity.valid.128_2",
        "perplexity.text",
        "perplexity.text_2",
    ]
    assert len(set(found)) == len(found)
    assert all(re.fullmatch(r"[\w.]+", name) for name in found)
