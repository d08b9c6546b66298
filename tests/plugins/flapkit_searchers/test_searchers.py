"""The structures of the paper: exact budgets, floors, and what goes first."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from conftest import make_llama
from hypothesis import given, settings
from hypothesis import strategies as st

import flapkit
from flapkit.checkpoint.export import is_uniform
from flapkit.model.budget import Budget
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Coupling, Site
from flapkit.pruning.algorithm import find_plan
from flapkit.pruning.ranking import standardise
from flapkit.registry import SEARCHER, Registry
from flapkit.system.errors import BudgetError, InputError, PluginError

STRUCTURES = ("al_am", "al_mm", "ul_mm", "ul_um")
LAYERS, HEADS, WIDTH, NEURONS = 3, 8, 4, 50


def site(layer, kind):
    units, width = (HEADS, WIDTH) if kind == "attention" else (NEURONS, 1)
    coupled = Coupling("p", 0, width * (3 if kind == "attention" else 2), 32)
    return Site(f"layers.{layer}.{kind}", layer, kind, "c", units, width, 32, (coupled,))


SITES = tuple(site(layer, kind) for layer in range(LAYERS) for kind in ("attention", "mlp"))
HEAD, NEURON = SITES[0].params_per_unit, SITES[1].params_per_unit


def make(name, **options):
    return Registry.load().create(SEARCHER, name, options)


def scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {s.name: torch.rand(s.units, s.channels_per_unit, generator=generator).double() for s in SITES}


def search(name, ratio, of="blocks", seed=0, **options):
    return find_plan(SITES, scores(seed), make(name, **options), Budget.over(SITES, ratio, of))


def gone(plan, kind):
    return [s.units - len(plan.keep[s.name]) for s in SITES if s.kind == kind]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(STRUCTURES), st.floats(0.01, 0.7), st.integers(1, 2), st.integers(0, 2**31))
def test_budgets_and_floors(name, ratio, min_units, seed):
    plan = search(name, ratio, seed=seed, min_units=min_units)
    plan.check(SITES)
    short = Budget.over(SITES, ratio).params - plan.removed_params(SITES)
    slack = {"al_am": max(HEAD, NEURON), "al_mm": NEURON, "ul_mm": LAYERS * NEURON, "ul_um": LAYERS * (HEAD + NEURON)}
    assert -1 <= short < slack[name]
    assert all(len(plan.keep[s.name]) >= min_units for s in SITES)


def test_uniform_layers_are_uniform():
    assert gone(search("ul_um", 0.3), "attention") == [2] * LAYERS
    assert gone(search("ul_um", 0.3), "mlp") == [15] * LAYERS
    plan = search("ul_mm", 0.3, heads=1)
    assert gone(plan, "attention") == [1] * LAYERS
    # 0.3 of a layer, less a head.
    assert gone(plan, "mlp") == [int((0.3 * (HEADS * HEAD + NEURONS * NEURON) - HEAD) / NEURON)] * LAYERS


def test_ul_mm_takes_as_many_heads_as_the_ratio_does():
    assert gone(search("ul_mm", 0.3), "attention") == gone(search("ul_um", 0.3), "attention")


@pytest.mark.parametrize(("heads", "total"), [(1.0, 3), (1.34, 4), (0, 0), (None, 7)])
def test_al_mm_counts_heads_over_all_layers(heads, total):
    plan = search("al_mm", 0.3, heads=heads)
    assert sum(gone(plan, "attention")) == total
    assert 0 <= Budget.over(SITES, 0.3).params - plan.removed_params(SITES) < NEURON


def test_all_layers_rank_by_standardised_scores():
    found = scores()
    values = {
        name: standardise(score.pow(2 if "attention" in name else 1)).mean(dim=1) for name, score in found.items()
    }
    plan = search("al_mm", 0.3, heads=2)
    for kind in ("attention", "mlp"):
        ranked = sorted(
            (float(value), s.name, unit) for s in SITES if s.kind == kind for unit, value in enumerate(values[s.name])
        )
        removed = {(s.name, unit) for s in SITES if s.kind == kind for unit in plan.removed_units(s)}
        assert removed == {(name, unit) for _, name, unit in ranked[: len(removed)]}


@pytest.mark.parametrize("name", ["ul_mm", "ul_um"])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_a_layers_own_rank_by_the_sum_of_raw_scores(name, power):
    plan = search(name, 0.3, attention_power=power)
    for s in SITES:
        sums = scores()[s.name].pow(power if s.kind == "attention" else 1).sum(dim=1)
        assert plan.removed_units(s) == sorted(sums.argsort()[: len(plan.removed_units(s))].tolist())


def test_attention_power_matters():
    assert search("ul_um", 0.4, attention_power=1.0) != search("ul_um", 0.4, attention_power=8.0)


def test_a_profile_by_hand():
    plan = search("ul_um", 0.3, profile=(0.0, 0.3, 0.6))
    assert gone(plan, "mlp") == [0, 15, 30]
    assert gone(plan, "attention") == [0, 2, 4]
    # In proportion: the budget says how far it goes.
    assert search("ul_um", 0.3, profile=(0, 1, 2)) == plan


@pytest.mark.parametrize(
    ("name", "options", "ratio", "of", "message"),
    [
        ("ul_um", {"profile": (1.0, 2.0)}, 0.3, "blocks", "expected 3 ratios, one per layer"),
        ("ul_um", {"profile": (0.0, 0.0, 0.0)}, 0.3, "blocks", "not all 0"),
        ("ul_um", {"profile": (0.0, 0.0, 1.0)}, 0.5, "blocks", "removes 150% of layer 2"),
        ("ul_um", {"min_units": 6}, 0.5, "blocks", "layers.0.attention: with every site at its minimum"),
        ("ul_mm", {"heads": 8}, 0.5, "blocks", "cannot remove 8 units from layers.0.attention: .* at most 7 can"),
        ("ul_mm", {"heads": 7}, 0.2, "blocks", "removing 7 of the heads exceeds the budget of layer 0"),
        ("ul_mm", {"heads": 0}, 0.9, "blocks", "cannot remove .* parameters from layers.0.mlp"),
        ("al_mm", {"heads": 7}, 0.2, "blocks", "removing 21 of the heads exceeds the budget"),
        ("al_mm", {}, 0.2, "mlp", "budget.of: mlp leaves no attention to prune"),
        ("ul_mm", {}, 0.2, "attention", "budget.of: attention leaves no MLP to prune"),
    ],
)
def test_budgets_that_cannot_be_met(name, options, ratio, of, message):
    with pytest.raises(BudgetError, match=message):
        search(name, ratio, of, **options)


@pytest.mark.parametrize("of", ["attention", "mlp"])
def test_one_module_alone(of):
    plan = search("ul_um", 0.5, of)
    assert set(gone(plan, "attention")) == {4 if of == "attention" else 0}
    assert set(gone(plan, "mlp")) == {25 if of == "mlp" else 0}


@pytest.mark.parametrize("name", STRUCTURES)
def test_on_a_model(llama, tokens, name):
    sites = flapkit.sites(llama)
    before = llama.num_parameters()
    plan = flapkit.prune_(llama, tokens, searcher=name, ratio=0.4, compensator="none")
    assert before - llama.num_parameters() == plan.removed_params(sites)
    assert torch.isfinite(llama(tokens[:2]).logits).all()


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(search("al_am", 0.3).to_json())
    return path


def test_a_saved_plan(saved):
    assert search("plan", 0.3, path=str(saved)) == search("al_am", 0.3)


def test_a_plan_by_hand(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"keep": {"layers.1.mlp": list(range(40))}}))
    ratio = 10 * NEURON / sum(s.params for s in SITES)
    plan = search("plan", round(ratio, 4), path=str(path))
    assert gone(plan, "mlp") == [0, 10, 0]
    assert gone(plan, "attention") == [0] * LAYERS


@pytest.mark.parametrize(
    ("keep", "ratio", "of", "message"),
    [
        ({"layers.1.mlp": [0]}, 0.1, "blocks", r"set budget.ratio to 0\.1763"),
        ({"layers.1.mpl": [0]}, 0.1, "blocks", "did you mean 'layers.1.mlp'"),
        ({"layers.1.mlp": [0, 50]}, 0.3, "blocks", "keeps unit 50, but the model has 50 there"),
        ({"layers.1.mlp": []}, 0.3, "blocks", "keeps no unit"),
        ({"layers.1.mlp": [0]}, 0.3, "attention", "budget.of: attention prunes these sites only"),
        ({"layers.1.mlp": "all"}, 0.3, "blocks", "a list of whole numbers"),
        (None, 0.3, "blocks", "mine.json: plan: not JSON"),
    ],
)
def test_plans_that_do_not_fit(tmp_path, keep, ratio, of, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"keep": keep}) if keep else "{")
    with pytest.raises(InputError, match=message):
        search("plan", ratio, of, path=str(path))


def test_a_plan_that_is_not_there(tmp_path):
    with pytest.raises(PluginError, match="file not found"):
        make("plan", path=str(tmp_path / "nothing.json"))


def test_a_plan_needs_no_calibration(tokens, probe, tmp_path):
    """Nothing is measured where neither the searcher nor the compensator needs it."""
    model, other = make_llama(), make_llama()
    plan = flapkit.prune_(model, tokens, ratio=0.4, compensator="none")
    (tmp_path / "plan.json").write_text(plan.to_json())
    searcher = make("plan", path=str(tmp_path / "plan.json"))
    with torch.no_grad():
        # Activations that calibration would refuse.
        other.model.layers[0].self_attn.v_proj.weight[0] = 3e38
    assert flapkit.prune_(other, tokens, searcher=searcher, ratio=0.4, compensator="none") == plan
    again = make_llama()
    assert flapkit.prune_(again, tokens, searcher=searcher, ratio=0.4) == plan
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert torch.isfinite(again(probe).logits).all()


@pytest.mark.parametrize("name", STRUCTURES)
def test_those_that_promise_uniform_layers(tokens, name):
    assert make(name).uniform == name.startswith("ul")
    assert not make("ul_um", profile=(1, 2)).uniform
    model = make_llama()
    flapkit.prune_(model, tokens, searcher=name, ratio=0.35)
    assert is_uniform(flapkit.sites(model)) == make(name).uniform


@pytest.mark.parametrize("name", STRUCTURES)
def test_what_has_to_go_together_does(name):
    """Experts of a layer keep the same number, and so do the query heads of each key/value head."""
    sites = []
    for layer in range(2):
        attention, mlp = site(layer, "attention"), site(layer, "mlp")
        sites.append(dataclasses.replace(attention, runs=2))
        sites += [dataclasses.replace(mlp, name=f"{mlp.name}.{i}", group=f"layers.{layer}") for i in range(3)]
    found = {
        s.name: torch.rand(s.units, s.channels_per_unit, generator=torch.Generator().manual_seed(i)).double()
        for i, s in enumerate(sites)
    }
    budget = Budget.over(sites, 0.5)
    plan = find_plan(sites, found, make(name), budget)
    assert 0.9 * budget.params < plan.removed_params(sites) <= budget.params
    for s in sites:
        if s.kind == "attention":
            assert len({sum(unit // 4 == run for unit in plan.keep[s.name]) for run in range(2)}) == 1
        else:
            assert len(plan.keep[s.name]) == len(plan.keep[f"layers.{s.layer}.mlp.0"])
