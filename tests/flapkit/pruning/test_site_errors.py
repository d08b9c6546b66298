"""The error of a site: what is predicted is what is measured, where the statistics know everything."""

from __future__ import annotations

import dataclasses

import pytest

import flapkit
from flapkit.execution.executor import CalibrationText
from flapkit.execution.executor import prune_ as run_pruning_
from flapkit.execution.whole import WholeExecutor
from flapkit.model.budget import Budget
from flapkit.pruning import site_errors
from flapkit.pruning.algorithm import Method
from flapkit.pruning.collector import measure
from flapkit.pruning.gram import Gram
from flapkit.pruning.site_errors import Trace
from flapkit.registry import COMPENSATOR, METRIC, SEARCHER, Registry


def traced(model, sites, tokens):
    trace = Trace(sites, tokens, model.dtype)
    trace.see(model, measure(model, sites, [trace.statistic], trace.batches))
    return trace


def compared(trace, model, sites, pruned):
    measured = measure(model, trace.pruned_sites(pruned.plan, sites), [trace.statistic], trace.batches)
    return trace.compare(model, measured, pruned.plan, pruned.expected)


def prune_measured_(model, sites, tokens, statistics, method, ratio):
    executor = WholeExecutor(model, sites, CalibrationText(tokens), statistics=statistics)
    return run_pruning_(executor, method, Budget.over(sites, ratio))


def prune_(model, tokens, compensator, ratio=0.4, extra=()):
    """Trace, prune and compare on one and the same text."""
    registry = Registry.load()
    options = {"ridge": 0.01} if compensator == "least_squares" else {}
    repair = registry.get(COMPENSATOR, compensator)(**options)
    method = Method(registry.create(METRIC, "wifv"), registry.create(SEARCHER, "al_am"), (repair,))
    sites = flapkit.sites(model)
    trace = traced(model, sites, tokens)
    kinds = tuple(dict.fromkeys((*method.statistics, *extra)))
    statistics = measure(model, sites, kinds, [{"input_ids": tokens}])
    pruned = prune_measured_(model, sites, tokens, statistics, method, ratio)
    return sites, trace, pruned, compared(trace, model, sites, pruned)


def magnitude():
    """A method that needs no statistics."""
    registry = Registry.load()
    parts = [registry.create(METRIC, "magnitude"), registry.create(SEARCHER, "al_am")]
    return Method(*parts, (registry.create(COMPENSATOR, "none"),))


@pytest.mark.parametrize("compensator", ["none", "bias", "least_squares"])
def test_a_gram_predicts_exactly(llama, tokens, compensator):
    _, _, _, errors = prune_(llama, tokens, compensator, extra=(Gram,))
    assert errors
    for error in errors.values():
        assert error.predicted == pytest.approx(error.alone, rel=2e-3, abs=1e-4)


def test_moments_predict_what_uncorrelated_channels_lose(llama, tokens):
    _, _, _, errors = prune_(llama, tokens, "bias", ratio=0.1)
    for error in errors.values():
        assert error.predicted > 0
        assert error.predicted == pytest.approx(error.alone, rel=0.5)


def test_the_first_site_sees_the_dense_input(llama, tokens):
    sites, _, pruned, errors = prune_(llama, tokens, "bias")
    first = next(site.name for site in sites if site.name in pruned.expected)
    assert errors[first].in_model == pytest.approx(errors[first].alone, rel=1e-5)
    last = errors[list(errors)[-1]]
    assert last.in_model != pytest.approx(last.alone, rel=1e-3)


def test_only_sites_that_lost_units_are_compared(llama, tokens):
    sites, trace, pruned, errors = prune_(llama, tokens, "none", ratio=0.05)
    assert set(errors) == set(pruned.expected)
    assert set(errors) == {site.name for site in sites if len(pruned.plan.keep[site.name]) < site.units}
    assert trace.tokens == tokens.numel()


def test_without_statistics_nothing_is_predicted(llama, tokens):
    sites = flapkit.sites(llama)
    trace = traced(llama, sites, tokens[:2])
    pruned = prune_measured_(llama, sites, tokens, measure(llama, sites, [], []), magnitude(), 0.4)
    assert set(pruned.expected.values()) == {None}
    errors = compared(trace, llama, sites, pruned)
    assert all(error.predicted is None and error.alone > 0 for error in errors.values())


def test_a_trace_keeps_no_more_than_it_may(llama, tokens, monkeypatch):
    monkeypatch.setattr(site_errors, "LARGEST_TRACE", 1)
    trace = traced(llama, flapkit.sites(llama), tokens)
    assert trace.tokens == 64 < tokens.numel()


def test_nothing_is_left_on_the_model(llama, tokens):
    prune_(llama, tokens, "bias")
    assert not any(module._forward_hooks for module in llama.modules())


def test_sites_that_other_tokens_may_reach_are_not_compared_in_the_model(llama, tokens):
    sites = flapkit.sites(llama)
    # Two sites of a kind in one layer, as experts are.
    alike = [dataclasses.replace(site, kind="mlp") for site in sites]
    trace = traced(llama, alike, tokens[:2])
    pruned = prune_measured_(llama, sites, tokens, measure(llama, sites, [], []), magnitude(), 0.4)
    errors = compared(trace, llama, alike, pruned)
    assert errors
    assert all(error.in_model is None and error.alone > 0 for error in errors.values())
