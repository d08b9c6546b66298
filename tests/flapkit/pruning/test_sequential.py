"""Sequential repair: what earlier sites lost is made good by later ones, in one sweep."""

from __future__ import annotations

import pytest
import torch
from conftest import make_llama
from flapkit_compensators.least_squares import LeastSquares

import flapkit
from flapkit.api import PruneOptions
from flapkit.execution.stream import HiddenStates, LayerRunner
from flapkit.model.plan import PruningPlan
from flapkit.model.site import groups
from flapkit.model.surgery import copy_sharing_weights, mask_
from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.pruning.algorithm import Repairs
from flapkit.pruning.gram import Gram, TargetGram
from flapkit.pruning.sequential import LayerRepair, adds_outputs, copy_layer


def layer_repair(model, index, tokens, before=None):
    """Prepare the repair of a layer, with the same hidden states in both streams unless told otherwise."""
    forms = {type(model.model.layers[0]).__name__: False}
    runner, batch = LayerRunner(model, "model.layers", forms=forms), {"input_ids": tokens}
    sites = [site for site in flapkit.sites(model) if site.layer == index]
    dense, pruned = HiddenStates(), HiddenStates()
    dense.put(0, before[0] if before else runner.embed(batch))
    pruned.put(0, before[1] if before else runner.embed(batch))
    targets = {site.name: HiddenStates() for site in sites}
    return LayerRepair(runner, index, sites, [batch], dense, pruned, targets), sites


def test_the_first_site_sees_the_dense_model(llama, tokens):
    """There the inputs are the dense ones, and the targets the dense outputs less the consumer's own bias."""
    repair, sites = layer_repair(llama, 0, tokens)
    repair.run_dense()
    assert repair.adds
    measured = repair._measure(sites[:1], LeastSquares(ridge=0.01))
    seen = measured[sites[0].name][TargetGram].spread
    products, weight = seen.squares[0], llama.get_submodule(sites[0].consumer).weight.detach().double()
    x, t = slice(sites[0].channels), slice(sites[0].channels, None)
    torch.testing.assert_close(products[t, x], weight @ products[x, x], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(seen.mean[t], weight @ seen.mean[x], atol=1e-4, rtol=1e-4)
    assert not any(module._forward_hooks for module in llama.modules())


@torch.no_grad()
def test_a_target_makes_the_hidden_state_the_dense_one(llama, tokens, monkeypatch):
    """Whatever was done to the earlier sites: with the target as its output, the layer gives the dense hidden state."""
    sites, runner, batch = flapkit.sites(llama), LayerRunner(llama, "model.layers"), {"input_ids": tokens}
    masked = copy_sharing_weights(llama, sites, own=[site.name for site in sites])
    mask_(masked, sites[:2], PruningPlan({site.name: (0, 1) for site in sites[:2]}))
    first = LayerRunner(masked, "model.layers").step(0, batch)
    before = (runner.step(0, batch), first)
    repair, in_layer = layer_repair(llama, 1, tokens, before)
    repair.run_dense()
    wanted = repair._dense[0]
    llama.model.layers[1] = copy_layer(llama, llama.model.layers[1], in_layer)
    repair.mask_(in_layer[:1], PruningPlan({in_layer[0].name: (0, 1)}), Repairs())
    seen = []
    monkeypatch.setattr(TargetGram, "update", lambda self, rows, weights: seen.append(rows[:, in_layer[1].channels :]))
    repair._measure(in_layer[1:], LeastSquares(ridge=0.1))
    consumer = llama.get_submodule(in_layer[1].consumer)
    target = seen[0].view(*tokens.shape, -1) + (0 if consumer.bias is None else consumer.bias)
    consumer.register_forward_hook(lambda module, args, output: target)
    torch.testing.assert_close(runner.step(1, batch, first), wanted, atol=1e-4, rtol=1e-4)


def test_a_token_weighs_less_the_larger_it_is(llama, tokens, monkeypatch):
    """The norm that reads the hidden state divides by its size."""
    repair, sites = layer_repair(llama, 0, tokens)
    repair.run_dense()
    seen = []
    monkeypatch.setattr(TargetGram, "update", lambda self, rows, weights: seen.append(weights))
    repair._measure(sites[:1], LeastSquares(ridge=0.1))
    sizes = repair._targets[sites[0].name][0].flatten(0, 1).square().mean(dim=1).sqrt()
    torch.testing.assert_close(seen[0] * sizes, torch.ones_like(sizes))


@torch.no_grad()
def test_closer_to_the_dense_model(tokens):
    dense = make_llama()(tokens).logits
    distance = {}
    for sequential in (False, True):
        model = make_llama()
        flapkit.prune_(
            model,
            tokens,
            compensator=LeastSquares(ridge=1e-3),
            ratio=0.4,
            options=PruneOptions(sequential=sequential),
        )
        distance[sequential] = float((model(tokens).logits - dense).square().mean())
    assert distance[True] < distance[False]


@pytest.mark.parametrize("compensator", ["none", "bias", "least_squares"])
def test_the_plan_is_that_of_one_go(llama, tokens, compensator):
    before = {name: parameter.clone() for name, parameter in llama.named_parameters()}
    copy = make_llama(**{k: v for k, v in llama.config.to_dict().items() if k != "dtype"})
    copy.load_state_dict(llama.state_dict())
    plan = flapkit.prune_(llama, tokens, compensator=compensator, ratio=0.4, options=PruneOptions(sequential=True))
    assert plan == flapkit.prune_(copy, tokens, compensator=compensator, ratio=0.4)
    assert not any(module._forward_hooks for module in llama.modules())
    kept = [name for name, parameter in llama.named_parameters() if "proj" not in name]
    assert all(torch.equal(llama.get_parameter(name), before[name]) for name in kept)


def test_trials_are_repaired_in_one_go(tokens):
    """Also where the metric does not measure what their repair needs: the plan that wins is the same."""
    searcher = {"name": "evolution", "generations": 1, "children": 2, "survivors": 1, "steps": [0.25]}
    plans = [
        flapkit.prune_(
            make_llama(), tokens, "magnitude", searcher, "least_squares", options=PruneOptions(sequential=sequential)
        )
        for sequential in (False, True)
    ]
    assert plans[0] == plans[1]


def test_only_consumers_are_copied(llama):
    sites = [site for site in flapkit.sites(llama) if site.layer == 0]
    layer = llama.model.layers[0]
    copied, shared = copy_layer(llama, layer, sites), {id(parameter) for parameter in layer.parameters()}
    own = [name for name, parameter in copied.named_parameters() if id(parameter) not in shared]
    consumers = {site.consumer.removeprefix("model.layers.0.") for site in sites}
    assert {name.rpartition(".")[0] for name in own} == consumers


@pytest.mark.parametrize("layers", [2, 6])
def test_the_cost_does_not_grow_with_the_depth(tokens, layers):
    """Each layer runs once as it is dense, once for each of its sites, and once more as it is pruned."""
    model, runs = make_llama(num_hidden_layers=layers), [0] * layers
    for index, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    flapkit.prune_(
        model,
        tokens,
        searcher="ul_um",
        compensator="least_squares",
        ratio=0.4,
        options=PruneOptions(sequential=True, batch_size=24),
    )
    # And once in the calibration that scores.
    assert runs == [5] * layers


def test_outputs_that_are_scaled_are_not_added():
    before = torch.randn(2, 3, 4)
    outputs = [torch.randn(2, 3, 4), torch.randn(2, 3, 4)]
    assert adds_outputs(before, before + sum(outputs), outputs)
    assert not adds_outputs(before, before + 0.5 * sum(outputs), outputs)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gemma2", "mixtral", "gpt_neox", "olmo2"])
def test_layers_of_every_kind(model_type, tokens):
    """Norms behind an output, experts, parallel blocks: each is repaired, and never worse than not at all."""
    text = tokens % 64
    logits, distance = None, {}
    for compensator in ("none", "least_squares"):
        model = tiny_model(tiny_config(model_type, vocab_size=64))
        logits = model(text).logits if logits is None else logits
        flapkit.prune_(model, text, compensator=compensator, ratio=0.3, options=PruneOptions(sequential=True))
        distance[compensator] = float((model(text).logits - logits).square().mean())
    assert distance["least_squares"] < distance["none"]


def test_experts_are_measured_together_without_targets(tokens):
    model = tiny_model(tiny_config("mixtral", vocab_size=64))
    sites = flapkit.sites(model)
    together = next(part for part in groups(sites) if part[0].expert is not None)
    repair, _ = layer_repair(model, 0, tokens % 64)
    repair.run_dense()
    assert not repair.adds
    measured = repair._measure(together, LeastSquares(ridge=0.01))
    assert set(measured) == {site.name for site in together}
    assert all(Gram in statistics for statistics in measured.values())
