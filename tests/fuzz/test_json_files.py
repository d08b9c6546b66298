"""The JSON files of a run and of a checkpoint, changed by somebody: read as they are, or refused in words."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from fuzzing import VALUES, cases, read, tampered, to_bytes
from hypothesis import example, given
from hypothesis import strategies as st
from runs import make_run, make_sites

from flapkit.model.plan import PruningPlan
from flapkit.run.sweep.plot import draw
from flapkit.run.sweep.results import Results, Row
from flapkit.run.sweep.schema import Plot
from flapkit.run.sweep.table import table, to_csv
from flapkit.system.errors import InputError

SITES = make_sites(2)
PLAN = {"keep": {site.name: list(range(0, site.units, 2)) for site in SITES}}
RUN = make_run(layers=2)
KEYS = ["metric", "budget.ratio"]
ROW: dict[str, Any] = {
    "id": "a",
    "settings": {"metric": "wifv", "budget.ratio": 0.2},
    "params": {"dense": 100, "pruned": 90, "blocks": 80, "removed": 10},
    "perplexity": {"t": {"dense": 4.0, "pruned": 5.0, "bits_per_byte": {"dense": 1.5}}},
    "zero_shot": {"piqa": {"items": 3}},
    "scores": {"mean": {"dense": {"value": 0.6, "stderr": 0.1}, "pruned": {"value": 0.5, "stderr": None}}},
    "minutes": 0.1,
    "seconds": {"prune": 0.5},
    "warnings": ["w"],
    "method": "mine",
}
TOKENS = st.sampled_from(
    ["{", "}", "[", "]", ",", ":", '"keep"', '"\\ud800"', "NaN", "1e999", "-1", "null", "9" * 5000, "\0"]
)


def write(tree: Any) -> str:
    """Write JSON with what Python's JSON knows beyond the standard."""
    return json.dumps(tree)


@cases(480)
@given(st.text(max_size=40) | st.lists(TOKENS, max_size=12).map("".join) | VALUES.map(write))
@example('{"keep": ' + "[" * 200_000)
@example('{"keep": {"a": [' + "9" * 5000 + "]}}")
@example('{"keep": {"a": [1], "a": [2]}}')
@example('{"keep": {"\\ud800": [1]}}')
@example('{"keep": {"a": [true]}}')
@example('{"keep": {"a": [0, NaN]}}')
def test_no_plan(text):
    try:
        plan = PruningPlan.from_json(text)
    except InputError:
        return
    assert plan.to_json() == PruningPlan.from_json(plan.to_json()).to_json()


@cases(480)
@given(tampered(PLAN))
@example({"keep": {**PLAN["keep"], "layers.0.mlp": [0, 0, 1]}})
@example({"keep": {**PLAN["keep"], "layers.0.mlp": [1, 0]}})
@example({"keep": {**PLAN["keep"], "layers.0.mlp": [-1, 0]}})
@example({"keep": {**PLAN["keep"], "layers.0.mlp": [0, 10**30]}})
@example({"keep": {**PLAN["keep"], "layers.9.mlp": [0]}})
@example({"keep": {**PLAN["keep"], "layers.0.mlp": []}})
def test_a_plan_that_was_changed_fits_or_is_refused(tree):
    try:
        plan = PruningPlan.from_json(write(tree))
        plan.check(SITES)
    except InputError:
        return
    assert set(plan.keep) == {site.name for site in SITES}
    for site in SITES:
        units = plan.keep[site.name]
        assert units
        assert list(units) == sorted(set(units))
        assert 0 <= units[0] <= units[-1] < site.units


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("rows")


def rows_of(folder: Path, lines: list[str]) -> list[Row]:
    (folder / "results.jsonl").write_bytes(to_bytes("".join(f"{line}\n" for line in lines)))
    return list((read(lambda: Results(folder).rows, "results.jsonl:") or {}).values())


@cases(400)
@given(st.lists(tampered(ROW).map(write) | st.text(max_size=20), max_size=3))
@example(["[" * 100_000])
@example(['{"id": [], "settings": {}}'])
@example(['{"id": "a", "settings": {}, "error": 5}'])
@example(['{"id": "a", "settings": {}, "params": {"dense": 1}}'])
@example(['{"id": "a", "settings": {}, "perplexity": {"t": {"dense": 1.0, "pruned": 2.0}}}'])
@example([write({**ROW, "perplexity": {"t": {"dense": 1.0}}})])
@example([write({**ROW, "params": {**ROW["params"], "blocks": 0}})])
@example([write({**ROW, "perplexity": {"t": {"dense": -4.0, "pruned": 5.0}}})])
def test_rows_of_a_sweep(folder, lines):
    rows = rows_of(folder, lines)
    for row in rows:
        assert isinstance(row.id, str)
        assert row.error is None or isinstance(row.error, str)
    assert to_csv(table(KEYS, rows)).count("\n") > len(rows)


@pytest.mark.filterwarnings("ignore::UserWarning")
@cases(15)
@given(tampered(ROW).map(write))
@example(write({**ROW, "perplexity": {"t": {"dense": 4.0, "pruned": math.inf}}}))
@example(write({**ROW, "perplexity": {"t": {"dense": math.inf, "pruned": 1e308}}}))
@example(write({**ROW, "perplexity": {"t": {"dense": 1e-300, "pruned": 1e300}}}))
@example(write({**ROW, "settings": {"metric": "wifv", "budget.ratio": math.nan}}))
@example(write({**ROW, "settings": {"metric": "wifv", "budget.ratio": 1e300}}))
@example(write({**ROW, "params": {"pruned": 2**63 - 1, "blocks": 1, "removed": 2**63 - 1}}))
@example(write({**ROW, "perplexity": {"$\\foo$": {"dense": 1.0, "pruned": 2.0}}}))
@example(write({**ROW, "settings": {"metric": {"name": "$\\foo$"}, "budget.ratio": 0.3}}))
def test_a_plot_of_rows_of_a_sweep(folder, line):
    rows = rows_of(folder, [write(ROW), line])
    for asked in (Plot(), Plot(x="budget.ratio")):
        assert draw(rows, KEYS, asked, "svg")
