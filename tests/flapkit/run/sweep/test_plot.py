"""What is made of a sweep's rows."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from xml.etree import ElementTree

import pytest

from flapkit.recipe.schema import Perplexity
from flapkit.run.sweep.plot import draw, lines
from flapkit.run.sweep.results import Row
from flapkit.run.sweep.schema import Plot
from flapkit.run.sweep.table import columns, table, to_csv
from flapkit.run.text import name_evaluations

KEYS = ("metric", "calibration.seed", "budget.ratio")


def row(metric, seed, ratio, pruned):
    settings = {"metric": metric, "calibration.seed": seed, "budget.ratio": ratio}
    params = {"dense": 100, "pruned": round(100 * (1 - ratio)), "blocks": 80, "removed": round(100 * ratio)}
    return Row(f"{settings}", settings, None, params, {"text": {"dense": 5.0, "pruned": pruned}})


ROWS = [row(m, s, r, 5 + 10 * r + s) for m in ("wifv", "ifv") for s in (0, 1) for r in (0.2, 0.5)]
FAILED = Row("failed", {"metric": "wifv"}, "BudgetError: too much")


def test_a_line_for_each_method():
    found = lines([*ROWS, FAILED], KEYS, Plot(), "text")
    assert list(found) == ["wifv, seed 0", "wifv, seed 1", "ifv, seed 0", "ifv, seed 1"]
    assert found["wifv, seed 1"].values == {80: [8.0], 50: [11.0]}


def test_averaged_over_seeds():
    found = lines(ROWS, KEYS, Plot(x="budget.ratio", over=("calibration.seed",)), "text")
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


def test_csv():
    read = list(csv.DictReader(io.StringIO(to_csv(KEYS, [*ROWS[:1], FAILED]))))
    assert read[0]["metric"] == "wifv"
    assert float(read[0]["removed"]) == 0.25
    assert (float(read[0]["perplexity.text"]), float(read[0]["perplexity.text.dense"])) == (7.0, 5.0)
    assert read[1]["error"] == "BudgetError: too much"


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
    found = columns(KEYS, [dataclasses.replace(ROWS[0], perplexity=measured)])
    pruned = [name for name in found if name.startswith("perplexity.") and not name.endswith(".dense")]
    assert pruned == [
        "perplexity.valid.128",
        "perplexity.valid.128.2",
        "perplexity.stdlib_heldout.2048.stride_512",
        "perplexity.my_text_one.64",
        "perplexity.valid.128_2",
        "perplexity.text",
        "perplexity.text_2",
    ]
    assert len(set(found)) == len(found) == len(table(KEYS, [dataclasses.replace(ROWS[0], perplexity=measured)])[0])
    assert all(re.fullmatch(r"[\w.]+", name) for name in found)
