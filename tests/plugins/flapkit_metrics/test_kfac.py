"""KFAC is what OBS loses, weighed by how the loss minds it."""

from __future__ import annotations

import torch
from conftest import make_llama
from flapkit_metrics.kfac import KFAC, OutputGradient
from flapkit_metrics.obs import OBS
from planted import site_of

import flapkit
from flapkit.pruning.collector import measure
from flapkit.pruning.gram import Gram
from flapkit.pruning.statistics import SiteStatistics


def statistics(x, gradient, units):
    found = [Gram(x.shape[1]), OutputGradient(x.shape[1], gradient.shape[1])]
    found[0].update(x)
    found[1].update(x, gradient)
    return SiteStatistics(found)


def test_where_all_outputs_matter_alike_it_is_obs():
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(80, 6, generator=draw), torch.randn(4, 6, generator=draw)
    site, stats = site_of(units=3, width=2), statistics(x, torch.eye(4).repeat(20, 1), 3)
    torch.testing.assert_close(KFAC().score(site, stats, weight), 10 * OBS().score(site, stats, weight))


def test_outputs_without_gradient_are_worth_nothing():
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(80, 6, generator=draw), torch.randn(4, 6, generator=draw)
    gradient = torch.randn(80, 4, generator=draw)
    gradient[:, 2] = 0
    weight[:, 4] = 0
    weight[2, 4] = 9
    score = KFAC().score(site_of(units=6, width=1), statistics(x, gradient, 6), weight)
    assert score[4] == 0
    assert (score[[0, 1, 2, 3, 5]] > 0).all()


def test_it_sees_the_gradients_of_a_model(tokens):
    model = make_llama()
    sites = flapkit.sites(model)
    measured = measure(model, sites, KFAC.statistics, [{"input_ids": tokens}])
    for site in sites:
        products = measured[site.name][OutputGradient].products
        assert (products.diagonal() >= 0).all()
        assert products.trace() > 0
    plan = flapkit.prune_(model, tokens, metric="kfac", searcher="per_parameter", compensator="least_squares")
    assert plan.removed_params(sites)
