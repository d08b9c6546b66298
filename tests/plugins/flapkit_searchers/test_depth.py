"""Depth: whole layers and blocks, by the angle by which they turn the hidden states."""

from __future__ import annotations

import pytest
import torch
from conftest import make_llama

import flapkit
from flapkit.model.budget import Budget
from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.pruning.angles import Angles
from flapkit.pruning.collector import measure
from flapkit.registry import METRIC, SEARCHER, Registry
from flapkit.system.errors import BudgetError


@pytest.fixture
def deep():
    return make_llama(num_hidden_layers=5, num_key_value_heads=2)


def angle(one, other):
    return torch.arccos(torch.cosine_similarity(one.double(), other.double(), dim=-1).clamp(-1, 1)).mean() / torch.pi


@torch.no_grad()
def test_angles_are_those_of_the_hidden_states(deep, tokens):
    attentions, handles = [], []
    for layer in deep.model.layers:
        handles.append(layer.self_attn.register_forward_hook(lambda _, inputs, out: attentions.append(out[0])))
    states = []
    for layer in deep.model.layers:
        handles.append(layer.register_forward_hook(lambda _, inputs, out: states.append((inputs[0], out))))
    deep.model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    sites = flapkit.sites(deep)
    for batches in ([tokens], tokens.split(3)):
        measured = measure(deep, sites, [Angles], [{"input_ids": part} for part in batches], stop_early=True)
        for site in sites:
            before, after = states[site.layer]
            between = before + attentions[site.layer]
            ends = (before, between) if site.kind == "attention" else (between, after)
            assert measured[site.name][Angles].layer == pytest.approx(float(angle(before, after)), rel=1e-5)
            assert measured[site.name][Angles].block == pytest.approx(float(angle(*ends)), rel=1e-5)


@torch.no_grad()
def test_padding_does_not_count(deep, tokens):
    sites, mask = flapkit.sites(deep), torch.ones_like(tokens)
    mask[:, :3] = 0
    other = torch.where(mask.bool(), tokens, 5)
    one, two = (
        measure(deep, sites, [Angles], [{"input_ids": text, "attention_mask": mask}]) for text in (tokens, other)
    )
    for site in sites:
        assert one[site.name][Angles].layer == pytest.approx(two[site.name][Angles].layer, rel=1e-5)


@pytest.mark.parametrize(("remove", "of"), [("layers", "layer"), ("blocks", "block")])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.7])
def test_all_but_the_last_go_whole(deep, tokens, remove, of, ratio):
    sites = flapkit.sites(deep)
    plan = flapkit.prune_(
        deep, tokens, {"name": "angular", "of": of}, {"name": "depth", "remove": remove}, "least_squares", ratio
    )
    budget = Budget.over(sites, ratio)
    assert 0 <= budget.params - plan.removed_params(sites) < min(site.params_per_unit for site in sites)
    partly = [site for site in sites if 0 < len(plan.keep[site.name]) < site.units]
    # Where a head is too large for what is left, neurons of the next block go.
    assert len({site.layer if remove == "layers" else site.name for site in partly}) <= 2


def test_the_least_turning_layer_goes_first(deep, tokens):
    with torch.no_grad():
        for projection in (deep.model.layers[3].self_attn.o_proj, deep.model.layers[3].mlp.down_proj):
            projection.weight *= 1e-3
    plan = flapkit.prune_(deep, tokens, "angular", "depth", "bias", 0.2)
    assert {name for name, units in plan.keep.items() if not units} == {"layers.3.attention", "layers.3.mlp"}


def test_a_mixture_loses_no_layer(tokens):
    model = tiny_model(tiny_config("mixtral"))
    with pytest.raises(BudgetError, match=r"depth: layers\.0\.experts\.0 cannot be removed whole"):
        flapkit.prune_(model, tokens, "angular", "depth", "bias", 0.2)


def test_scores_add_up_to_the_angle(deep, tokens):
    metric = Registry.load().create(METRIC, "angular", {"of": "block"})
    sites = flapkit.sites(deep)
    measured = measure(deep, sites, metric.measures(), [{"input_ids": tokens}])
    for site in sites:
        weight = deep.get_parameter(site.weight).detach()
        scores = metric.score(site, measured[site.name].only(metric.measures()), weight)
        assert float(scores.sum()) == pytest.approx(measured[site.name][Angles].block)
    assert Registry.load().create(SEARCHER, "depth").uses_scores
