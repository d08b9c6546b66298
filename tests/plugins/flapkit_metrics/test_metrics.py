"""Every metric against a direct computation from the consumers' inputs, or from autograd."""

from __future__ import annotations

import pytest
import torch
from conftest import FORMS, make_llama

import flapkit
from flapkit.pruning.algorithm import score_sites
from flapkit.pruning.collector import measure
from flapkit.registry import METRIC, Registry


def scored(model, tokens, metric, batch=24, **options):
    component = Registry.load().create(METRIC, metric, options)
    sites = flapkit.sites(model)
    batches = [{"input_ids": part} for part in tokens.split(batch)] if component.statistics else []
    return score_sites(model, sites, measure(model, sites, component.statistics, batches), component)


def inputs_of(model, tokens):
    """Each site's consumer input, float64 [tokens, channels], and its weight."""
    seen, handles = {}, []
    for site in flapkit.sites(model):
        consumer = model.get_submodule(site.consumer)

        def see(module, args, site=site):
            seen[site.name] = (args[0].flatten(0, 1).double(), module.weight.detach().double())

        handles.append(consumer.register_forward_pre_hook(see))
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


def units(model, name):
    return next(site.units for site in flapkit.sites(model) if site.name == name)


DIRECT = {
    "ifv": lambda x, w, n: x.var(dim=0).view(n, -1),
    "wifv": lambda x, w, n: (x.var(dim=0) * w.square().sum(dim=0)).view(n, -1),
    "wifn": lambda x, w, n: (w.abs() * x.norm(dim=0)).mean(dim=0).view(n, -1) / len(x) ** 0.5,
    "wanda_sp": lambda x, w, n: (w.abs() * x.norm(dim=0)).view(len(w), n, -1).sum(dim=(0, 2))[:, None] / len(x) ** 0.5,
    "magnitude": lambda x, w, n: w.square().sum(dim=0).sqrt().view(n, -1).sum(dim=1)[:, None],
}


@pytest.mark.parametrize("metric", DIRECT)
def test_formula(llama, tokens, metric):
    scores = scored(llama, tokens, metric, batch=7)
    for name, (x, weight) in inputs_of(llama, tokens).items():
        expected = DIRECT[metric](x, weight, units(llama, name))
        torch.testing.assert_close(scores[name], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("metric", ["magnitude", "random"])
def test_needs_no_statistics(metric):
    assert Registry.load().get(METRIC, metric).statistics == ()


def test_wanda_ranks_neurons_as_wifn_does(tokens):
    one, other = (scored(make_llama(), tokens, metric) for metric in ("wanda_sp", "wifn"))
    torch.testing.assert_close(one["layers.0.mlp"], 32 * other["layers.0.mlp"])


def weight_gradients(model, tokens):
    """Each parameter times its gradient of the summed cross-entropy, by autograd."""
    model.requires_grad_(True)
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").backward()
    terms = {name: (p * p.grad).detach().double() for name, p in model.named_parameters()}
    model.zero_grad()
    return terms


@pytest.mark.parametrize("batch", [24, 5])
@pytest.mark.parametrize("form", ["element", "vector"])
def test_taylor_is_autograds(llama, tokens, form, batch):
    scores = scored(llama, tokens, "taylor", batch, form=form)
    terms = weight_gradients(llama, tokens)
    for site in flapkit.sites(llama):
        columns = terms[f"{site.consumer}.weight"]
        expected = columns.sum(dim=0).abs() if form == "vector" else columns.abs().sum(dim=0)
        torch.testing.assert_close(scores[site.name].flatten(), expected, rtol=1e-3, atol=1e-3)


def test_taylors_vector_is_also_that_of_values_and_up_rows(tokens):
    """What the docstring says of the rows that the consumer's columns stand for."""
    model = make_llama()
    scores, terms = scored(model, tokens, "taylor", form="vector"), weight_gradients(model, tokens)
    for layer in range(2):
        values = terms[f"model.layers.{layer}.self_attn.v_proj.weight"].sum(dim=1).abs()
        torch.testing.assert_close(scores[f"layers.{layer}.attention"].flatten(), values, rtol=1e-3, atol=1e-3)
        up = terms[f"model.layers.{layer}.mlp.up_proj.weight"].sum(dim=1).abs()
        torch.testing.assert_close(scores[f"layers.{layer}.mlp"].flatten(), up, rtol=1e-3, atol=1e-3)


def test_taylor_sees_no_padding(tokens):
    model = make_llama()
    component = Registry.load().create(METRIC, "taylor")
    sites = flapkit.sites(model)
    padded = torch.cat([tokens, torch.full((len(tokens), 4), 7)], dim=1)
    mask = torch.cat([torch.ones_like(tokens), torch.zeros(len(tokens), 4, dtype=torch.long)], dim=1)
    batch = {"input_ids": padded, "attention_mask": mask}
    scores = score_sites(model, sites, measure(model, sites, component.statistics, [batch]), component)
    for name, expected in scored(model, tokens, "taylor").items():
        torch.testing.assert_close(scores[name], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["mha", "gqa"])
def test_taylor_leaves_no_trace(tokens, form):
    model = make_llama(**FORMS[form])
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    scored(model, tokens, "taylor")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_random_is_seeded_and_differs_by_site():
    model = make_llama()
    one, again = (scored(model, None, "random", seed=7) for _ in range(2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["layers.0.mlp"], one["layers.1.mlp"])
    assert not torch.equal(one["layers.0.mlp"], scored(model, None, "random", seed=8)["layers.0.mlp"])
    assert all(((scores >= 0) & (scores < 1)).all() for scores in one.values())
