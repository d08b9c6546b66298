"""The JSON files of a run and of a checkpoint, changed by somebody: read as they are, or refused in words."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import make_llama
from fuzzing import VALUES, cases, read, tampered
from hypothesis import example, given
from hypothesis import strategies as st
from runs import RECIPE, make_run, make_sites

import flapkit
from flapkit.errors import InputError
from flapkit.plan import PruningPlan
from flapkit.pruning import carry_out_
from flapkit.recover import _carried, plan_of
from flapkit.sites import Site
from flapkit.sweep.results import Results

SITES = make_sites(2)
PLAN = {"keep": {site.name: list(range(0, site.units, 2)) for site in SITES}}
RUN = make_run(layers=2)
ROW = {"id": "a", "settings": {"metric": "wifv"}, "params": {"dense": 1}, "perplexity": {"t": {"dense": 1.0}}}
TOKENS = st.sampled_from(
    ["{", "}", "[", "]", ",", ":", '"keep"', '"\\ud800"', "NaN", "1e999", "-1", "null", "9" * 5000, "\0"]
)


def write(tree: Any) -> str:
    """Write JSON with what Python's JSON knows beyond the standard."""
    return json.dumps(tree)


@cases(1200)
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


@cases(1200)
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


@cases(300)
@given(st.lists(tampered(ROW).map(write) | st.text(max_size=20), max_size=3))
@example(["[" * 100_000])
@example(['{"id": [], "settings": {}}'])
@example(['{"id": "a", "settings": {}, "error": 5}'])
def test_rows_of_a_sweep(tmp_path_factory, lines):
    folder = tmp_path_factory.getbasetemp() / "rows"
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass"))
    for name, row in (read(lambda: Results(folder).rows, "results.jsonl:") or {}).items():
        assert isinstance(name, str)
        assert row.error is None or isinstance(row.error, str)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "pruned"
    model = make_llama()
    sites: tuple[Site, ...] = flapkit.sites(model)
    plan = PruningPlan({site.name: tuple(range(site.units)) for site in sites})
    carry_out_(model, sites, plan, {})
    flapkit.save(
        model, folder, plan, files={"result.json": write(RUN.result), "notes/a.txt": "a", "recipe.yaml": RECIPE}
    )
    return folder


@cases(300)
@given(tampered({"versions": {"flapkit": "1"}, "files": ["notes/a.txt", "result.json"], "params": {"dense": 1}}))
@example({"files": ["../outside.txt"]})
@example({"files": ["/etc/passwd"]})
@example({"files": ["notes/../../outside.txt"]})
@example({"files": ["C:\\outside.txt"]})
@example({"files": "notes"})
@example({"files": {"a": 1}})
def test_what_a_checkpoint_carries_lies_in_it(checkpoint, tree):
    (checkpoint / "flapkit.json").write_text(write(tree))
    (checkpoint.parent / "outside.txt").write_text("a secret")
    for path in (read(lambda: _carried(checkpoint), "flapkit.json") or {}).values():
        assert path.absolute().is_relative_to(checkpoint.absolute())
        assert ".." not in path.parts


def test_a_checkpoint_without_a_plan_is_named(checkpoint):
    (checkpoint / "flapkit.json").write_text("{}")
    content = (checkpoint / "plan.json").read_bytes()
    for damage in (b"\xff", b"[" * 100_000, b"", b"{}"):
        (checkpoint / "plan.json").write_bytes(damage)
        for reader in (plan_of, flapkit.load):
            with pytest.raises(InputError, match=r"plan"):
                reader(checkpoint)
    (checkpoint / "plan.json").write_bytes(content)
    assert math.isfinite(sum(map(len, plan_of(checkpoint).keep.values())))
