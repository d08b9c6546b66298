"""Plans and budgets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flapkit.model.plan import Budget, PruningPlan
from flapkit.model.site import Site
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
        ({"a": (0, 4), "m": (1,)}, "from 0 to 3"),
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
