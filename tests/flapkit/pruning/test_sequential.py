"""Sequential calibration: what earlier sites lost is made good by later ones."""

from __future__ import annotations

import pytest
import torch
from conftest import make_llama
from flapkit_compensators.least_squares import LeastSquares
from torch import nn

import flapkit
from flapkit.model.plan import PruningPlan
from flapkit.model.surgery import mask_
from flapkit.pruning.collector import collect
from flapkit.pruning.sequential import PrefixCollector, check_outputs_are_added, copy_consumers
from flapkit.pruning.statistics import TargetGram
from flapkit.system.errors import InputError


def test_the_first_site_sees_the_dense_model(llama, tokens):
    """There the inputs are the dense ones, and the targets the dense outputs less the consumer's own bias."""
    sites = flapkit.sites(llama)
    collector = PrefixCollector(llama, copy_consumers(llama, sites), sites, sites[0], [TargetGram])
    seen = collect(collector, collector._model, [{"input_ids": tokens}])[sites[0].name][TargetGram].spread
    products, weight = seen.squares[0], llama.get_submodule(sites[0].consumer).weight.detach().double()
    x, t = slice(sites[0].channels), slice(sites[0].channels, None)
    torch.testing.assert_close(products[t, x], weight @ products[x, x], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(seen.mean[t], weight @ seen.mean[x], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_target_makes_the_hidden_state_the_dense_one(llama, tokens):
    """Whatever was done to the earlier sites: with the target as its output, the layer gives the dense hidden state."""
    sites = flapkit.sites(llama)
    pruned = copy_consumers(llama, sites)
    for site in sites[:3]:
        mask_(pruned, [site], PruningPlan({site.name: (0, 1)}))
    collector = PrefixCollector(llama, pruned, sites, sites[3], [TargetGram])
    collect(collector, pruned, [{"input_ids": tokens}])
    consumer = pruned.get_submodule(sites[3].consumer)
    bias = 0 if consumer.bias is None else consumer.bias
    target = (collector._target - bias).view(*tokens.shape, -1)
    consumer.register_forward_hook(lambda module, args, output: target + bias)
    hidden = [model.model(tokens).last_hidden_state for model in (pruned, llama)]
    torch.testing.assert_close(*hidden, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_closer_to_the_dense_model(tokens):
    dense = make_llama()(tokens).logits
    distance = {}
    for sequential in (False, True):
        model = make_llama()
        flapkit.prune_(model, tokens, compensator=LeastSquares(ridge=1e-3), ratio=0.4, sequential=sequential)
        distance[sequential] = float((model(tokens).logits - dense).square().mean())
    assert distance[True] < distance[False]


@pytest.mark.parametrize("compensator", ["none", "bias", "least_squares"])
def test_the_plan_is_that_of_one_go(llama, tokens, compensator):
    before = {name: parameter.clone() for name, parameter in llama.named_parameters()}
    copy = make_llama(**{k: v for k, v in llama.config.to_dict().items() if k != "dtype"})
    copy.load_state_dict(llama.state_dict())
    plan = flapkit.prune_(llama, tokens, compensator=compensator, ratio=0.4, sequential=True)
    assert plan == flapkit.prune_(copy, tokens, compensator=compensator, ratio=0.4)
    assert not any(module._forward_hooks for module in llama.modules())
    kept = [name for name, parameter in llama.named_parameters() if "proj" not in name]
    assert all(torch.equal(llama.get_parameter(name), before[name]) for name in kept)


def test_only_consumers_are_copied(llama):
    sites = flapkit.sites(llama)
    copied, shared = copy_consumers(llama, sites), {id(parameter) for parameter in llama.parameters()}
    own = [name for name, parameter in copied.named_parameters() if id(parameter) not in shared]
    assert all(name.rpartition(".")[0] in {site.consumer for site in sites} for name in own)
    assert len(own) >= len(sites)


def test_outputs_that_are_normed_are_refused(tokens):
    model = make_llama()
    sites = flapkit.sites(model)
    check_outputs_are_added(model, sites[2:], {"input_ids": tokens})

    class Scaled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 0.5 * self.inner.down_proj(self.inner.act_fn(self.inner.gate_proj(x)) * self.inner.up_proj(x))

    mlp = model.model.layers[1].mlp
    mlp.forward = Scaled(mlp).forward
    with pytest.raises(InputError, match="layer 1 does more than add"):
        check_outputs_are_added(model, sites[2:], {"input_ids": tokens})
    with pytest.raises(InputError, match=r"calibration\.sequential"):
        flapkit.prune_(model, tokens, compensator="least_squares", ratio=0.4, sequential=True)
    assert not any(module._forward_hooks for module in model.modules())
