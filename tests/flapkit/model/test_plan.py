"""Plans and budgets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_llama
from hypothesis import given
from hypothesis import strategies as st

import flapkit
from flapkit.model.budget import Budget
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site
from flapkit.model.surgery import Correction
from flapkit.pruning.algorithm import Pruned
from flapkit.pruning.moments import Moments
from flapkit.pruning.statistics import SiteStatistics
from flapkit.system.errors import BudgetError, InputError

SITES = (
    Site("a", 0, "attention", "a.o", 4, 2, 8, ()),
    Site("m", 0, "mlp", "m.down", 10, 1, 8, ()),
)


@given(st.dictionaries(st.text(), st.lists(st.integers(0, 10**6)).map(tuple)))
def test_json_round_trip(keep):
    assert PruningPlan.from_json(PruningPlan(keep).to_json()) == PruningPlan(keep)


@given(st.one_of(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists).map(str)))
def test_any_other_text_is_refused(text):
    with pytest.raises(InputError, match="plan: "):
        PruningPlan.from_json(text)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"a": (0,)}, "missing sites: m"),
        ({"a": (0,), "m": (1,), "x": (1,)}, "has no site 'x'"),
        ({"a": (), "m": (1,)}, "a keeps no unit"),
        ({"a": (0, 4), "m": (1,)}, "keeps unit 4, but the model has 4 there, .* another model"),
        ({"a": (-1, 0), "m": (1,)}, "from 0 to 3"),
        ({"a": (1, 0), "m": (1,)}, "ascending"),
        ({"a": (1, 1), "m": (1,)}, "ascending"),
    ],
)
def test_a_plan_that_does_not_fit(keep, message):
    with pytest.raises(InputError, match=message):
        PruningPlan(keep).check(SITES)


def test_removed_params_are_counted():
    assert PruningPlan({"a": (0, 3), "m": tuple(range(9))}).removed_params(SITES) == 2 * 16 + 8


def test_a_budget_counts_its_base():
    assert Budget.over(SITES, 0.5).params == (64 + 80) // 2
    assert Budget.over(SITES, 0.5, "attention").params == 32
    assert Budget.over(SITES, 0.5, "mlp").params == 40
    assert Budget.over(SITES, 0.5, "model", 1000).params == 500


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, float("nan"), float("inf")])
def test_no_ratio(ratio):
    with pytest.raises(BudgetError, match="is out of range"):
        Budget.over(SITES, ratio)


def test_an_unknown_base():
    with pytest.raises(BudgetError, match="did you mean 'blocks'"):
        Budget.over(SITES, 0.5, "block")


def experts(layer, count, units=8):
    return [
        Site(f"layers.{layer}.experts.{index}", layer, "mlp", "e", units, 1, 8, (), expert=index, group="e")
        for index in range(count)
    ]


def test_a_summary_is_a_table():
    sites = [
        *(replace(site, name=f"layers.{layer}.{site.kind}") for layer in range(11) for site in SITES),
        *experts(0, 3),
    ]
    keep = {site.name: tuple(range(site.units // 2)) for site in sites}
    plan = PruningPlan({**keep, "layers.10.mlp": (4,), "layers.0.attention": (0, 1, 2, 3)})
    lines = plan.summary(sites).splitlines()
    assert lines[0].split() == ["layer", "attention", "mlp", "experts"]
    assert lines[1].split() == ["0", "4", "of", "4", "5", "of", "10", "3", "x", "4", "of", "8"]
    assert lines[11].split() == ["10", "2", "of", "4", "1", "of", "10"]
    removed = plan.removed_params(sites)
    assert lines[12].startswith(f"removed: {removed:,} of {sum(site.params for site in sites):,} parameters (")
    assert plan.summary().splitlines()[11].split() == ["10", "2", "1"]
    page = plan._repr_html_()
    assert page.count("<tr>") == 12
    assert "<td>3 x 4</td>" in page
    assert PruningPlan({"<a>": (1,)})._repr_html_() == (
        "<table><tr><th>layer</th><th>&lt;a&gt;</th></tr><tr><td></td><td>1</td></tr></table>"
    )
    assert PruningPlan().summary() == "layer"


@torch.no_grad()
def test_what_is_shown_of_an_object_is_short():
    model = make_llama(intermediate_size=2000)
    sites = flapkit.sites(model)
    shown = [
        *sites,
        Budget.over(sites, 0.2),
        PruningPlan({site.name: tuple(range(site.units)) for site in sites}),
        Correction(torch.ones(100, 100), torch.ones(100), "a note"),
        Correction(),
        SiteStatistics([Moments.of(sites[0])]),
        Moments.of(sites[1]),
        Pruned({site.name: torch.ones(site.units, 1) for site in sites}, PruningPlan()),
    ]
    assert all(len(repr(each)) < 120 for each in shown)
    assert repr(shown[-5]) == "Correction(weight=[100, 100] float32, bias=[100] float32, note='a note')"
