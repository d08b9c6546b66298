"""Scores of whole experts: what REAP's formula gives, however the text is batched."""

from __future__ import annotations

import pytest
import torch

from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.pruning.algorithm import score_sites
from flapkit.pruning.collector import measure
from flapkit.pruning.contributions import Contributions
from flapkit.registry import ADAPTER, METRIC, Registry

TOKENS = torch.randint(2, 96, (12, 10), generator=torch.Generator().manual_seed(1))


def scores(model, name, size=12):
    registry = Registry.load()
    sites = registry.create(ADAPTER, model.config.model_type, {"expert_unit": "expert"}).sites(model.config)
    sites = [site for site in sites if site.kind == "mixture"]
    metric = registry.create(METRIC, name)
    statistics = measure(model, sites, metric.measures(), [{"input_ids": part} for part in TOKENS.split(size)])
    return {site: score[:, 0] for site, score in score_sites(model, sites, statistics, metric).items()}


@torch.no_grad()
def by_hand(model, layer):
    """Run every expert on every token, and average over the tokens that are routed to it."""
    seen = []
    mixture = model.model.layers[layer].mlp
    hook = mixture.gate.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    model(TOKENS)
    hook.remove()
    (hidden, (_, weights, chosen)), experts = seen[0], mixture.experts
    means, shares = [], []
    for expert in range(len(experts.down_proj)):
        token, slot = torch.where(chosen == expert)
        gate, up = (hidden[token] @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        output = (experts.act_fn(gate) * up) @ experts.down_proj[expert].T
        means.append(float((weights[token, slot] * output.norm(dim=-1)).mean()))
        shares.append(len(token) / len(hidden))
    return means, shares


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("size", [12, 5])
def test_the_formula(model_type, size):
    model = tiny_model(tiny_config(model_type))
    reap, frequency = (scores(model, name, size) for name in ("reap", "frequency"))
    for layer in range(2):
        means, shares = by_hand(model, layer)
        assert reap[f"layers.{layer}.mixture"].tolist() == pytest.approx(means, rel=1e-5)
        assert frequency[f"layers.{layer}.mixture"].tolist() == pytest.approx(shares)


def test_magnitude_is_the_norm_of_an_expert():
    model = tiny_model(tiny_config("mixtral"))
    found = scores(model, "magnitude")["layers.0.mixture"]
    weight = model.model.layers[0].mlp.experts.down_proj
    torch.testing.assert_close(found, weight.detach().double().flatten(1).norm(dim=1))


def test_an_expert_that_nobody_uses_goes_first():
    """Its router's weights send every token elsewhere."""
    statistic = Contributions(3)
    statistic.update(torch.tensor([[1.0, 0.0, 3.0], [2.0, 0.0, 0.0]]))
    assert statistic.mean.tolist() == [1.5, 0.0, 3.0]
    assert statistic.frequency.tolist() == [1.0, 0.0, 0.5]
