"""Pruning a model in memory: several passes over the text give what one pass does."""

from __future__ import annotations

import pytest
import torch
from conftest import make_llama
from flapkit_compensators.least_squares import LeastSquares

import flapkit
from flapkit.api import PruneOptions
from flapkit.execution.executor import CalibrationText
from flapkit.execution.lightning.data import held_out
from flapkit.execution.whole import WholeExecutor
from flapkit.model.plan import PruningPlan
from flapkit.pruning.algorithm import Method
from flapkit.pruning.collector import Collector, measure
from flapkit.pruning.gram import Gram, HeldOutGram, UnitGram
from flapkit.pruning.moments import Moments
from flapkit.pruning.statistics import size_of, split_by_memory
from flapkit.registry import METRIC, SEARCHER, Registry
from flapkit.system.errors import RecipeError

METHODS = [("wifv", "least_squares"), ("obs", LeastSquares(intercept=False)), ("trace", "bias"), ("magnitude", "none")]


@torch.no_grad()
@pytest.mark.parametrize("memory", [1, 30_000])
@pytest.mark.parametrize(("metric", "compensator"), METHODS)
def test_passes_are_one_go(tokens, probe, metric, compensator, memory):
    whole, parts = make_llama(num_key_value_heads=2), make_llama(num_key_value_heads=2)
    options = {"metric": metric, "compensator": compensator, "ratio": 0.4}
    plan = flapkit.prune_(whole, tokens, **options)
    assert flapkit.prune_(parts, tokens, **options, options=PruneOptions(statistics_memory=memory)) == plan
    torch.testing.assert_close(parts(probe).logits, whole(probe).logits, atol=1e-5, rtol=0)


def test_never_more_than_fits_at_once(tokens, monkeypatch):
    """No pass holds more statistics than the memory allows, and a pass goes no deeper than its sites."""
    model, held, reached = make_llama(), [], []
    begin = Collector.__enter__

    def entered(collector):
        kinds = {type(statistic) for site in collector.statistics.values() for statistic in site.values()}
        held.append(size_of(tuple(kinds), collector._sites))
        return begin(collector)

    monkeypatch.setattr(Collector, "__enter__", entered)
    model.model.norm.register_forward_hook(lambda *_: reached.append(1))
    flapkit.prune_(
        model, tokens, compensator="least_squares", ratio=0.4, options=PruneOptions(statistics_memory=30_000)
    )
    assert len(held) > 2
    assert max(held) <= 30_000
    assert not reached


@pytest.mark.parametrize("statistic", [Moments, Gram, HeldOutGram, UnitGram])
def test_sizes_are_known_before(llama, tokens, statistic):
    sites = flapkit.sites(llama)
    held_out = torch.arange(len(tokens)) % 4 == 3
    measured = measure(llama, sites, [statistic], [{"input_ids": tokens, "held_out": held_out}])
    for site in sites:
        state = measured[site.name][statistic].state
        assert sum(part.nbytes for part in state.values()) == statistic.size_of(site)


def test_no_statistic_of_a_search_sees_the_windows_that_judge(tokens):
    """The others alone are measured; plans are judged on those windows, and the repair is fitted on all."""
    text = CalibrationText(tokens)
    changed = tokens.clone()
    changed[held_out(len(tokens))] = 1
    model = make_llama()
    sites = flapkit.sites(model)
    registry = Registry.load()
    method = Method(registry.build(METRIC, "obs"), registry.build(SEARCHER, "evolution"), ())
    executors = [WholeExecutor(model, sites, CalibrationText(windows)) for windows in (tokens, changed)]
    searching = [executor.for_search(method) for executor in executors]
    searched = [executor.calibrate([Gram]) for executor in searching]
    for site in sites:
        assert torch.equal(*(statistics[site.name][Gram].spread.squares for statistics in searched))
    assert int(searched[0][sites[0].name][Gram].tokens) == tokens[~held_out(len(tokens))].numel()
    plan = PruningPlan({site.name: tuple(range(site.units // 2)) for site in sites})
    values = [executor.objective("kl", lambda *_: {}, ())([plan]) for executor in searching]
    assert values[0] != values[1]
    whole = WholeExecutor(model, sites, text).calibrate([Gram])
    assert int(whole[sites[0].name][Gram].tokens) == tokens.numel()


@pytest.mark.parametrize("searcher", ["evolution", "optuna", "gates"])
def test_a_search_that_needs_more_memory_is_refused_before_anything_is_measured(llama, tokens, searcher, monkeypatch):
    monkeypatch.setattr(Collector, "__enter__", lambda self: pytest.fail("measured"))
    options = {"searcher": searcher, "compensator": "least_squares", "ratio": 0.4}
    with pytest.raises(RecipeError, match=rf"searcher '{searcher}' needs .* together, .*statistics_memory is 0\.00 GB"):
        flapkit.prune_(llama, tokens, **options, options=PruneOptions(statistics_memory=30_000))


@pytest.mark.parametrize("searcher", ["evolution", "gates"])
def test_a_search_is_measured_apart(llama, tokens, searcher, monkeypatch):
    """Scores see three windows of four, and so do the trials' corrections; the last repair sees all."""
    seen, begin = [], Collector.begin
    monkeypatch.setattr(
        Collector, "begin", lambda self, batch: seen.append(len(batch["input_ids"])) or begin(self, batch)
    )
    short = {"evolution": {"generations": 1, "children": 2, "survivors": 1}, "gates": {"steps": 1}}
    options = {"metric": "obs", "compensator": "least_squares", "ratio": 0.3}
    flapkit.prune_(llama, tokens, searcher={"name": searcher, **short[searcher]}, **options)
    assert sum(seen) == int((~held_out(len(tokens))).sum()) + len(tokens)


def test_sites_are_split_in_their_order(llama):
    sites = flapkit.sites(llama)
    for memory in (1, 20_000, 10**9):
        parts = split_by_memory(sites, [Gram], memory)
        assert [site for part in parts for site in part] == list(sites)
        assert all(len(part) == 1 or size_of([Gram], part) <= memory for part in parts)
    assert len(split_by_memory(sites, [Gram], 10**9)) == 1


def test_what_is_left_early_is_measured_all_the_same(llama, tokens):
    sites = flapkit.sites(llama)
    whole = measure(llama, sites, [Moments], [{"input_ids": tokens}])
    early = measure(llama, sites[:2], [Moments], [{"input_ids": tokens}], stop_early=True)
    for site in sites[:2]:
        assert torch.equal(early[site.name][Moments].variance, whole[site.name][Moments].variance)
    assert not any(module._forward_hooks for module in llama.modules())
