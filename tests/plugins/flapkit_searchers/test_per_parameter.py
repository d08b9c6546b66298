"""The units whose parameters are worth least go."""

from __future__ import annotations

import torch
from conftest import make_llama
from flapkit_searchers.per_parameter import PerParameter

import flapkit
from flapkit.model.budget import Budget


def test_what_is_removed_is_worth_less_a_parameter_than_what_stays():
    sites = flapkit.sites(make_llama())
    draw = torch.Generator().manual_seed(0)
    scores = {site.name: torch.rand(site.units, 1, generator=draw) * site.params_per_unit for site in sites}
    budget = Budget.over(sites, 0.3)
    plan = PerParameter().search(sites, scores, budget)
    worth = {site.name: scores[site.name][:, 0] / site.params_per_unit for site in sites}
    mlps = [site for site in sites if site.kind == "mlp"]
    gone = torch.cat([worth[site.name][plan.removed_units(site)] for site in mlps])
    kept = torch.cat([worth[site.name][list(plan.keep[site.name])] for site in mlps])
    assert gone.max() <= kept.min()
    assert 0 <= budget.params - plan.removed_params(sites) < min(site.params_per_unit for site in sites)
