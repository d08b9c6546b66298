"""Any plan can be rounded, and removes no more than before."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import make_llama
from hypothesis import given, settings
from hypothesis import strategies as some

import flapkit
from flapkit.model.budget import Budget, Rounding
from flapkit.model.plan import PruningPlan
from flapkit.model.surgery import apply_plan_
from flapkit.pruning.algorithm import find_plan
from flapkit.pruning.rounding import round_plan, unaligned_widths
from flapkit.registry import SEARCHER, Registry
from flapkit.system.errors import BudgetError

SITES = flapkit.sites(make_llama(num_key_value_heads=2, head_dim=12))


def random_plan(seed: int) -> tuple[PruningPlan, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for site in SITES:
        count = int(torch.randint(1, site.units + 1, (1,), generator=generator))
        keep[site.name] = tuple(sorted(torch.randperm(site.units, generator=generator)[:count].tolist()))
    return PruningPlan(keep), {site.name: torch.rand(site.units, 3, generator=generator) for site in SITES}


@given(some.integers(0, 10_000), some.sampled_from([1, 2, 8, 16, 32, 48, 256]))
@settings(deadline=None, max_examples=60)
def test_every_width_is_a_multiple_or_whole(seed, multiple_of):
    plan, scores = random_plan(seed)
    rounded = round_plan(SITES, plan, scores, Rounding(multiple_of))
    rounded.check(SITES)
    for site in SITES:
        count = len(rounded.keep[site.name])
        assert count == site.units or count * site.channels_per_unit % multiple_of == 0
        # What stays is the plan's, as far as it goes.
        shorter, longer = sorted((set(plan.keep[site.name]), set(rounded.keep[site.name])), key=len)
        assert shorter <= longer
    assert rounded.removed_params(SITES) <= plan.removed_params(SITES)
    assert round_plan(SITES, rounded, scores, Rounding(multiple_of)) == rounded


def shared(site, count, devices):
    """What vLLM asks of every layer."""
    if site.kind == "mlp":
        return count % devices == 0
    kv_heads = count if site.units == site.kv_heads else site.kv_heads
    heads = count * site.heads // site.units
    return heads % devices == 0 and (kv_heads % devices == 0 or devices % kv_heads == 0)


UNEVEN = make_llama(hidden_size=72, num_attention_heads=9, num_key_value_heads=3, head_dim=8)
UNEVEN_SITES = {unit: flapkit.sites(UNEVEN, {"name": "llama", "unit": unit}) for unit in ("kv_group", "query_head")}


@given(some.integers(0, 10_000), some.sampled_from([2, 3, 4, 6]), some.sampled_from([1, 8, 48]), some.booleans())
@settings(deadline=None, max_examples=60)
def test_devices_can_share_every_layer_or_the_plan_is_refused(seed, devices, multiple_of, single):
    sites = UNEVEN_SITES["query_head" if single else "kv_group"]
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for site in sites:
        count = int(torch.randint(1, site.units_per_run + 1, (1,), generator=generator))
        keep[site.name] = tuple(r * site.units_per_run + unit for r in range(site.runs) for unit in range(count))
    plan = PruningPlan(keep)
    try:
        rounded = round_plan(sites, plan, {}, Rounding(multiple_of, devices))
    except BudgetError:
        # No rounding of some layer is shared, or only one that removes more.
        return
    rounded.check(sites)
    for site in sites:
        count = len(rounded.keep[site.name])
        assert shared(site, count, devices)
        assert count == site.units or count * site.channels_per_unit % multiple_of == 0
    assert rounded.removed_params(sites) <= plan.removed_params(sites)


def test_a_layer_that_devices_cannot_share_whole_is_pruned_and_others_less():
    """Three key/value heads of three query heads each: two devices can share two of the three alone."""
    sites = UNEVEN_SITES["kv_group"]
    whole = {site.name: tuple(range(site.units)) for site in sites}
    narrow = PruningPlan(whole | {site.name: tuple(range(1)) for site in sites if site.kind == "mlp"})
    rounded = round_plan(sites, narrow, {}, Rounding(tensor_parallel=2))
    assert [len(rounded.keep[site.name]) for site in sites if site.kind == "attention"] == [2, 2]
    least = sum(site.params_per_unit for site in sites if site.kind == "attention")
    with pytest.raises(BudgetError, match=rf"only if at least {least:,} parameters are removed; raise budget\.ratio"):
        round_plan(sites, PruningPlan(whole), {}, Rounding(tensor_parallel=2))
    with pytest.raises(BudgetError, match=r"layers.0.attention: its heads \(9 with 3 key/value heads\) cannot be"):
        round_plan(sites, narrow, {}, Rounding(tensor_parallel=8))


DEEP_SITES = flapkit.sites(make_llama(num_hidden_layers=5, num_key_value_heads=4))


@given(some.integers(0, 10_000), some.integers(1, 4), some.sampled_from([1, 2]))
@settings(deadline=None, max_examples=40)
def test_attentions_keep_few_numbers_of_heads_and_the_budget_is_met(seed, number, devices):
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for site in DEEP_SITES:
        count = int(torch.randint(1, site.units, (1,), generator=generator))
        keep[site.name] = tuple(sorted(torch.randperm(site.units, generator=generator)[:count].tolist()))
    plan, scores = PruningPlan(keep), {site.name: torch.rand(site.units, 1) for site in DEEP_SITES}
    rounded = round_plan(DEEP_SITES, plan, scores, Rounding(1, devices, number))
    heads = [site for site in DEEP_SITES if site.kind == "attention"]
    kept = {len(rounded.keep[site.name]) for site in heads}
    assert len(kept) <= number
    assert all(shared(site, len(rounded.keep[site.name]), devices) for site in DEEP_SITES)
    # It removes at most as much, and less by less than a step; one number for all takes a step in all layers.
    less = plan.removed_params(DEEP_SITES) - rounded.removed_params(DEEP_SITES)
    assert less >= 0
    if devices == 1:
        step = max(larger - smaller for smaller, larger in pairwise([0, *sorted(kept)]))
        assert less < step * heads[0].params_per_unit * (len(heads) if number == 1 else 1)
    assert round_plan(DEEP_SITES, rounded, scores, Rounding(1, devices, number)) == rounded


def test_few_numbers_of_heads_are_those_that_change_least():
    heads = [site for site in DEEP_SITES if site.kind == "attention"]
    plan = PruningPlan({site.name: tuple(range(n)) for site, n in zip(heads, [1, 1, 3, 3, 2], strict=True)})
    kept = [len(units) for units in round_plan(heads, plan, {}, Rounding(head_counts=2)).keep.values()]
    assert kept == [1, 1, 3, 3, 3]
    # Without other sites that units could come back to, one number removes no more than the plan.
    assert set(map(len, round_plan(heads, plan, {}, Rounding(head_counts=1)).keep.values())) == {2}


def test_attentions_of_many_sizes_that_the_budget_leaves_alone():
    model = make_llama(num_key_value_heads=2)
    sites = flapkit.sites(model)
    keep = {site.name: tuple(range(site.units)) for site in sites}
    apply_plan_(model, sites, PruningPlan(keep | {"layers.0.attention": (0,)}), {})
    sites = flapkit.sites(model)
    budget = Budget.over(sites, 0.3, "mlp", rounding=Rounding(head_counts=1))
    scores = {site.name: torch.rand(site.units, 1) for site in sites}
    with pytest.raises(BudgetError, match=r"2 different numbers of key/value heads already, and budget\.of: mlp"):
        find_plan(sites, scores, Registry.load().create(SEARCHER, "ul_um"), budget)
    # The second attention can give a head up, if as much is to go.
    whole = PruningPlan({site.name: tuple(range(site.units)) for site in sites})
    least = sites[2].params_per_unit
    with pytest.raises(BudgetError, match=rf"1 distinct numbers .* only if at least {least:,} parameters are removed"):
        round_plan(sites, whole, {}, Rounding(head_counts=1))
    keep = {**whole.keep, "layers.0.mlp": tuple(range(1))}
    rounded = round_plan(sites, PruningPlan(keep), {}, Rounding(head_counts=1))
    assert [len(rounded.keep[name]) for name in ("layers.0.attention", "layers.1.attention")] == [2, 1]
    assert rounded.removed_params(sites) <= PruningPlan(keep).removed_params(sites)
    single = [site for site in flapkit.sites(model, {"name": "llama", "unit": "query_head"}) if site.heads]
    whole = PruningPlan({site.name: tuple(range(site.units)) for site in single})
    with pytest.raises(BudgetError, match=r"head_counts: the attentions differ in size"):
        round_plan(single, whole, {}, Rounding(head_counts=1))


def test_a_site_outside_the_budget_is_shared_too():
    sites = UNEVEN_SITES["kv_group"]
    budget = Budget.over(sites, 0.3, "mlp", rounding=Rounding(tensor_parallel=2))
    scores = {site.name: torch.rand(site.units, 1) for site in sites}
    with pytest.raises(BudgetError, match=r"2 devices cannot share layers\.0\.attention, and budget\.of: mlp does not"):
        find_plan(sites, scores, Registry.load().create(SEARCHER, "ul_um"), budget)


def test_the_highest_scores_come_back_and_the_lowest_go():
    (site,) = [site for site in SITES if site.name == "layers.0.mlp"]
    scores = {site.name: torch.arange(site.units, dtype=torch.float64).view(-1, 1)}
    plan = PruningPlan({site.name: tuple(range(0, 26, 2))})
    assert round_plan([site], plan, scores, Rounding(16)).keep[site.name] == (*range(0, 26, 2), 37, 38, 39)


def test_a_site_that_is_nearly_down_goes_down_where_another_goes_up():
    first, second = [site for site in SITES if site.kind == "mlp"]
    plan = PruningPlan({first.name: tuple(range(17)), second.name: tuple(range(8, 23))})
    rounded = round_plan([first, second], plan, {}, Rounding(16))
    assert [len(rounded.keep[site.name]) for site in (first, second)] == [16, 16]
    plan = PruningPlan({first.name: tuple(range(17)), second.name: tuple(range(17))})
    assert sorted(len(kept) for kept in round_plan([first, second], plan, {}, Rounding(16)).keep.values()) == [16, 32]


@pytest.mark.parametrize("searcher", ["al_am", "al_mm", "ul_um", "ul_mm"])
def test_a_budget_rounds_any_searchers_plan(searcher):
    found = Registry.load().create(SEARCHER, searcher)
    _, scores = random_plan(0)
    budget = Budget.over(SITES, 0.3, rounding=Rounding(8))
    plan = find_plan(SITES, scores, found, budget)
    assert all(len(plan.keep[site.name]) % 8 == 0 for site in SITES if site.kind == "mlp")
    assert plan.removed_params(SITES) <= budget.params


def test_widths_that_are_not_multiples_are_found():
    plan = PruningPlan({site.name: tuple(range(min(site.units, 33))) for site in SITES})
    assert unaligned_widths(SITES, plan) == [33, 33]
    assert unaligned_widths(SITES, round_plan(SITES, plan, {}, Rounding(8)), 8) == []
    assert unaligned_widths(SITES, PruningPlan({site.name: tuple(range(site.units)) for site in SITES})) == []
